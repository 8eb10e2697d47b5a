"""MLA over whole sequences through PyTorch's fused attention: what is trained with and run on long text.

The fast twin of ``core.absorb.expanded_attention``; no score matrix is held.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from transmla.artifacts import LayerFactors, ScoreRules
from transmla.core.reference_attention import PLAIN, causal_softmax, unseen
from transmla.core.rope import rotate


def attended_values(x: Tensor, f: LayerFactors) -> Tensor:
    """What the heads read, before the output projection: [N, T, D] → [N, T, H·d_v].

    Runs in the dtype of ``x``, or in autocast's; rotations in float32 at least.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    positions = torch.arange(x.shape[1], device=x.device)
    heads, d_n, rank = f.k_up.shape
    query_input = x if f.q_latent is None else linear(x, f.q_latent)
    query = _heads(linear(query_input, torch.cat([f.q_nope, f.q_pe], 1).flatten(0, 1)), heads)
    cached = linear(x, torch.cat([f.latent, f.rope]))
    expanded = _heads(linear(cached[..., :rank], torch.cat([f.k_up, f.v_up], 1).flatten(0, 1)), heads)
    q_pe = rotate(query[..., d_n:].to(exact) * f.rope_gain, f.inv_freq, positions).to(query.dtype)
    k_pe = rotate(cached[..., rank:].to(exact), f.inv_freq, positions).to(query.dtype)
    q = torch.cat([query[..., :d_n], q_pe], -1)
    k = torch.cat([expanded[..., :d_n], k_pe[:, None].expand(-1, heads, -1, -1)], -1)
    value = expanded[..., d_n:]
    return attend(q, k, value, scaling=f.scaling, rules=f.rules).transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, *, scaling: float, rules: ScoreRules = PLAIN) -> Tensor:
    """Causal attention of whole sequences, q and k [N, H, T, d], v [N, H, T, d_v] → [N, H, T, d_v]."""
    if rules.softcap is not None:
        return causal_softmax(q @ k.mT * scaling, rules=rules).to(v.dtype) @ v
    # The fused kernels want one width; the wider of the two is padded for.
    width = max(q.shape[-1], v.shape[-1])
    q, k, wide = (pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    if rules.window is None and rules.sinks is None:
        return scaled_dot_product_attention(q, k, wide, is_causal=True, scale=scaling)[..., : v.shape[-1]]
    positions = torch.arange(q.shape[2], device=q.device)
    bias = torch.zeros_like(positions, dtype=q.dtype).expand(len(positions), -1)
    bias = bias.masked_fill(unseen(positions, positions, rules.window), float("-inf"))
    if rules.sinks is not None:
        # A key of nothing scores nothing, but for what the mask adds.
        k, wide = pad(k, (0, 0, 0, 1)), pad(wide, (0, 0, 0, 1))
        sinks = rules.sinks.to(bias)[:, None, None].expand(-1, len(positions), 1)
        bias = torch.cat([bias.expand(len(sinks), -1, -1), sinks], -1)
    return scaled_dot_product_attention(q, k, wide, attn_mask=bias, scale=scaling)[..., : v.shape[-1]]


def attended_heads(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, *, scaling: float, gain: float, rules: ScoreRules
) -> Tensor:
    """Attention of a source, q [N, H, T, d], k and v [N, G, T, d] → [N, T, H·d]; the rest as in ``core.absorb``."""
    exact = torch.promote_types(q.dtype, torch.float32)
    positions, share = torch.arange(q.shape[2], device=q.device), q.shape[1] // k.shape[1]
    q = rotate(q.to(exact) * gain, inv_freq, positions).to(v.dtype)
    k = rotate(k.to(exact), inv_freq, positions).to(v.dtype).repeat_interleave(share, 1)
    mixed = attend(q, k, v.repeat_interleave(share, 1), scaling=scaling, rules=rules)
    return mixed.transpose(1, 2).flatten(2)


def project(values: Tensor, f: LayerFactors) -> Tensor:
    """The output projection: [N, T, H·d_v] → [N, T, D]."""
    return linear(values, f.o.transpose(0, 1).flatten(1))


def fused_attention(x: Tensor, f: LayerFactors) -> Tensor:
    """``expanded_attention`` without its score matrix; [N, T, D] → [N, T, D]."""
    return project(attended_values(x, f), f)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[N, T, H·n] → [N, H, T, n]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)
