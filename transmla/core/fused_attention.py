"""Attention over whole sequences through PyTorch's fused kernels, for fits and for calibration text.

These functions equal those of ``core.reference_attention`` and, except with a softcap, hold no score matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from transmla.artifacts import LayerFactors, LayerWeights, ScoreRules
from transmla.core.reference_attention import PLAIN, is_masked, masked_softmax
from transmla.core.rope import rotate
from transmla.token_split import TokenSplit

# Queries of a block on a CPU, and the longest sequence that is attended to in such blocks: a backward pass keeps all
# attention weights.
CPU_BLOCK, CPU_LENGTH = 256, 2048
# Values in the rows of matrices for which GPUs have fast kernels: 16 bytes of bfloat16.
ALIGNMENT = 8


def fused_attention(
    x: Tensor,
    f: LayerFactors,
    positions: Tensor | None = None,
    split: TokenSplit | None = None,
    own: int | None = None,
) -> Tensor:
    """Return MLA's output, equal to ``expanded_attention``; [N, T, F] → [N, T, D].

    ``positions`` [T] are increasing; None means 0 to T − 1. With ``split``, the tokens and their positions are those of
    one process. With ``own``, query head h reads only the features h·own to (h + 1)·own, and the latent only those
    after all heads'; what the maps hold for other features is not read.
    The heads attend to the latent itself (the absorbed form) if it is narrower than their expanded keys and values.
    Gemma 3 then needs 256 channels instead of 288, and flash kernels hold at most 256.
    Runs in the dtype of ``x`` or of autocast. Rotations run in float32 or wider.
    """
    rotary_dtype = torch.promote_types(x.dtype, torch.float32)
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)
    heads, d_n, rank = f.k_up.shape
    q_maps, cached_maps = torch.cat([f.q_nope, f.q_pe], 1), torch.cat([f.latent, f.rope])
    if own is not None and f.q_latent is None:
        query = _own_queries(x, q_maps, own)
        x, cached_maps = x[..., heads * own :], cached_maps[:, heads * own :]
    else:
        query_input = x if f.q_latent is None else linear(_aligned(x), _aligned(f.q_latent))
        query = _heads(linear(_aligned(query_input), _aligned(q_maps.flatten(0, 1))), heads)
    cached = linear(_aligned(x), _aligned(cached_maps))
    latent = cached[..., :rank]
    q_pe = rotate(query[..., d_n:].to(rotary_dtype) * f.rope_gain, f.inv_freq, positions).to(query.dtype)
    k_pe = rotate(cached[..., rank:].to(rotary_dtype), f.inv_freq, positions).to(query.dtype)
    if rank < min(d_n, f.v_up.shape[1]):
        q = torch.cat([query[..., :d_n] @ f.k_up, q_pe], -1)
        k, value = (t[:, None].expand(-1, heads, -1, -1) for t in (torch.cat([latent, k_pe], -1), latent))
        mixed = attend(q, k, value, scaling=f.scaling, rules=f.rules, split=split) @ f.v_up.mT
    else:
        expanded = _heads(linear(latent, torch.cat([f.k_up, f.v_up], 1).flatten(0, 1)), heads)
        q = torch.cat([query[..., :d_n], q_pe], -1)
        k = torch.cat([expanded[..., :d_n], k_pe[:, None].expand(-1, heads, -1, -1)], -1)
        mixed = attend(q, k, expanded[..., d_n:], scaling=f.scaling, rules=f.rules, split=split)
    return linear(mixed.transpose(1, 2).flatten(2), f.o.transpose(0, 1).flatten(1))


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scaling: float, rules: ScoreRules = PLAIN, split: TokenSplit | None = None
) -> Tensor:
    """Return causal attention over whole sequences: q and k [N, H, T, d], v [N, H, T, d_v] → [N, H, T, d_v].

    With ``split``, the tokens are those of one process, which attend to the tokens of all processes.
    """
    if split is not None:
        heads = q.shape[1]
        q, k, v = split.to_heads(q), split.to_heads(k), split.to_heads(v)
        mixed = attend(q, k, v, scaling=scaling, rules=rules.heads(split.heads(heads)))
        return split.to_tokens(mixed, heads)
    if rules.sinks is not None and rules.window is None and rules.softcap is None:
        # A first query that nobody reads keeps the attention causal.
        q, k, v = _with_sinks(q, k, v, rules.sinks, scaling)
        return attend(pad(q, (0, 0, 1, 0)), k, v, scaling=scaling)[:, :, 1:]
    plain = rules.window is None and rules.softcap is None
    if plain and q.device.type == "cpu" and q.shape[2] <= CPU_LENGTH:
        return _attend_on_cpu(q, k, v, scaling)
    # The fused kernels need equal widths; zero padding changes neither scores nor values.
    width = max(q.shape[-1], v.shape[-1])
    q, k, padded_v = (pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    if rules.window is not None and q.shape[2] > 2 * rules.window:
        mixed = _attend_in_blocks(q, k, padded_v, rules.window, scaling=scaling, rules=rules)
    elif plain:
        mixed = scaled_dot_product_attention(q, k, padded_v, is_causal=True, scale=scaling)
    else:
        positions = torch.arange(q.shape[2], device=q.device)
        mixed = _attend_masked(q, k, padded_v, is_masked(positions, positions, rules.window), scaling, rules)
    return mixed[..., : v.shape[-1]]


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values whose first key, with a value of zero, is the sink of each head.

    One more channel gives it its score: it is one in all queries, and zero in all other keys. Further channels of zeros
    keep the width a multiple of ALIGNMENT.
    """
    width = q.shape[-1]
    more = ALIGNMENT - width % ALIGNMENT
    channel = torch.eye(1, more, dtype=q.dtype, device=q.device)
    sink = pad((sinks / scaling).to(k.dtype)[:, None, None] * channel, (width, 0)).expand(len(k), -1, -1, -1)
    q = torch.cat([q, channel.expand(*q.shape[:-1], -1)], -1)
    return q, torch.cat([sink, pad(k, (0, more))], 2), pad(v, (0, 0, 1, 0))


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Return the attention of ``attend`` without rules, block of queries by block, in the dtype of ``v``.

    A CPU with fast bfloat16 takes a quarter of the time of PyTorch's fused kernel, which multiplies in float32: 30
    instead of 108 ms with the backward pass, for 4 x 9 heads of 96 channels and 512 tokens on one Zen 5 core.
    """
    count, heads, length, _ = q.shape
    # Scores are rounded to the dtype of ``v``. What all keys share changes no softmax, and Qwen2.5's biases make it so
    # large that the rounding of bfloat16 would be several units.
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    k = k - k.detach().mean(2, keepdim=True)
    q, k, v = (t.to(v.dtype).flatten(0, 1) for t in (q, k, v))
    blocks = []
    # Autocast would widen the softmax to float32.
    with torch.autocast("cpu", enabled=False):
        for start in range(0, length, CPU_BLOCK):
            end = min(length, start + CPU_BLOCK)
            future = torch.full((end - start, end), float("-inf"), dtype=v.dtype).triu(start + 1)
            bias = future.expand(count * heads, -1, -1)
            scores = torch.baddbmm(bias, q[:, start:end], k[:, :end].mT, alpha=scaling)
            blocks.append(scores.softmax(-1) @ v[:, :end])
    return torch.cat(blocks, 1).view(count, heads, length, -1)


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, *, scaling: float, rules: ScoreRules) -> Tensor:
    """Return the attention of ``attend`` in time that grows with T · window instead of T²: [N, H, T, d] → [N, H, T, d].

    A block is as long as the window, so a query sees only keys of its own block and of the one before.
    """
    count, heads, length, _ = q.shape
    blocks = -(-length // window)
    end = blocks * window - length
    queries = pad(q, (0, 0, 0, end)).reshape(count, heads, blocks, window, -1)
    # One block of zeros lies before the first. [N, H, blocks, 2 · window, d]
    padded = (pad(t, (0, 0, window, end)).reshape(count, heads, blocks + 1, window, -1) for t in (k, v))
    pairs = (torch.cat([t[:, :, :-1], t[:, :, 1:]], 3) for t in padded)
    # [N · blocks, H, …, d]
    queries, keys, values = (t.transpose(1, 2).flatten(0, 1) for t in (queries, *pairs))
    key = torch.arange(-window, window, device=q.device)
    first = window * torch.arange(blocks, device=q.device)[:, None]
    # Zeros before the text are masked here. Those after it lie in the future of all queries that are kept.
    masked = is_masked(key[window:], key, window) | (first + key < 0)[:, None]
    mixed = _attend_masked(queries, keys, values, masked.repeat(count, 1, 1)[:, None], scaling, rules)
    mixed = mixed.reshape(count, blocks, heads, window, -1).transpose(1, 2)
    return mixed.flatten(2, 3)[:, :, :length]


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, scaling: float, rules: ScoreRules) -> Tensor:
    """Return the attention of q [N, H, Q, d] over the keys k and values v [N, H, T, d] that are not ``masked``.

    ``masked`` is [Q, T] or [N, 1, Q, T]; of ``rules``, only softcap and sinks are read.
    """
    if rules.softcap is not None:
        return masked_softmax(q @ k.mT * scaling, masked, rules).to(v.dtype) @ v
    bias = torch.zeros_like(masked, dtype=q.dtype).masked_fill(masked, float("-inf"))
    if rules.sinks is not None:
        q, k, v = _with_sinks(q, k, v, rules.sinks, scaling)
        bias = pad(bias, (1, 0))
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)


def attended_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    *,
    scaling: float,
    gain: float,
    rules: ScoreRules,
    positions: Tensor | None = None,
    split: TokenSplit | None = None,
) -> Tensor:
    """Return a source's attention before the output projection.

    Args:
        q: unrotated queries [N, H, T, d].
        k: unrotated keys [N, G, T, d].
        v: values [N, G, T, d].
        inv_freq: rotary frequencies [p], in radians per position.
        scaling: factor on the scores.
        gain: square of yarn's attention factor.
        rules: window, softcap and sinks.
        positions: increasing positions [T]; None means 0 to T − 1.
        split: which tokens of a sequence these are, if several processes share its tokens.

    Returns:
        [N, T, H·d], in the dtype of ``v``.
    """
    rotary_dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    if positions is None:
        positions = torch.arange(q.shape[2], device=q.device)
    q = rotate(q.to(rotary_dtype) * gain, inv_freq, positions).to(v.dtype)
    k = rotate(k.to(rotary_dtype), inv_freq, positions)
    if rules.softcap is None and rules.sinks is None:
        # What all keys share changes no softmax, and would be most of what bfloat16 rounds in models with biases.
        k = k - (k.mean(2, keepdim=True) if split is None else split.mean(k))
    k = k.to(v.dtype).repeat_interleave(group, 1)
    mixed = attend(q, k, v.repeat_interleave(group, 1), scaling=scaling, rules=rules, split=split)
    return mixed.transpose(1, 2).flatten(2)


def fused_source_attention(
    x: Tensor, weights: LayerWeights, inv_freq: Tensor, *, scaling: float, gain: float
) -> Tensor:
    """Return the output [N, T, D] of a source's attention, equal to ``source_attention``; arguments as there."""
    q, k, v = (torch.einsum("ntD,hdD->nhtd", x, maps) for maps in (weights.q, weights.k, weights.v))
    mixed = attended_heads(q, k, v, inv_freq, scaling=scaling, gain=gain, rules=weights.rules)
    return linear(mixed, weights.o.transpose(0, 1).flatten(1))


def _own_queries(x: Tensor, maps: Tensor, own: int) -> Tensor:
    """Return queries [N, H, T, e] for features x [N, T, F], if a head of ``maps`` [H, e, F] reads ``own`` of them."""
    heads, width, _ = maps.shape
    blocks = maps[..., : heads * own].reshape(heads, width, heads, own).diagonal(dim1=0, dim2=2)  # [e, own, H]
    features = x[..., : heads * own].reshape(*x.shape[:2], heads, own).transpose(1, 2)
    queries: Tensor = features @ blocks.permute(2, 1, 0)
    return queries


def _heads(x: Tensor, heads: int) -> Tensor:
    """Split heads: [N, T, H·n] → [N, H, T, n]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def _aligned(x: Tensor) -> Tensor:
    """Append zero columns up to a multiple of ALIGNMENT; products of two such matrices do not change.

    A source with biases has one feature more than its width, and GPUs multiply such matrices with older kernels.
    """
    missing = -x.shape[-1] % ALIGNMENT
    return pad(x, (0, missing)) if missing else x
