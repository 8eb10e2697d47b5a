"""Reference attention in plain tensor algebra: the source's, and MLA in its two equal forms.

The tests compare all fast code with these functions. They run in the dtype of their input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerWeights, ScoreRules
from transmla.core.rope import rotate

PLAIN = ScoreRules()


def causal_softmax(scores: Tensor, positions: Tensor | None = None, rules: ScoreRules = PLAIN) -> Tensor:
    """Return the attention weights [..., H, Q, T] of causal queries.

    Args:
        scores: [..., H, Q, T], after scaling.
        positions: positions [Q] of the queries among the T keys. None means all T.
        rules: window, softcap and sinks. Rows sum to one, and to less than one with sinks.
    """
    keys = torch.arange(scores.shape[-1], device=scores.device)
    queries = keys if positions is None else positions
    return masked_softmax(scores, is_masked(queries, keys, rules.window), rules)


def masked_softmax(scores: Tensor, masked: Tensor, rules: ScoreRules) -> Tensor:
    """Return the attention weights of ``scores`` [..., H, Q, T] with softcap and sinks; ``masked`` must broadcast."""
    if rules.softcap is not None:
        scores = (scores / rules.softcap).tanh() * rules.softcap
    scores = scores.masked_fill(masked, float("-inf"))
    if rules.sinks is None:
        return scores.softmax(-1)
    sinks = rules.sinks.to(scores)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


def is_masked(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return a mask [Q, T] that is true if a key is in a query's future or before its ``window``; takes positions."""
    distance = queries[:, None] - keys
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def source_scores(
    x: Tensor,
    weights: LayerWeights,
    inv_freq: Tensor,
    *,
    scaling: float,
    gain: float = 1.0,
    positions: Tensor | None = None,
) -> Tensor:
    """Return the scores [N, H, Q, T] of the source attention, before masks and softcap.

    Args:
        x: the attention's input [N, T, D].
        weights: the source's weights.
        inv_freq: rotary frequencies [p], in radians per position.
        scaling: factor on the scores.
        gain: square of yarn's attention factor.
        positions: positions [Q] of the queries. None means all T.
    """
    keys = torch.arange(x.shape[1], device=x.device)
    queries = keys if positions is None else positions
    group = weights.q.shape[0] // weights.k.shape[0]
    q = rotate(torch.einsum("ntD,hdD->nhtd", x[:, queries], weights.q), inv_freq, queries)
    k = rotate(torch.einsum("ntD,gdD->ngtd", x, weights.k), inv_freq, keys)
    return q @ k.repeat_interleave(group, 1).mT * (scaling * gain)


def source_attention(
    x: Tensor, weights: LayerWeights, inv_freq: Tensor, *, scaling: float, gain: float = 1.0
) -> Tensor:
    """Return the output [N, T, D] of the source attention; arguments as in ``source_scores``."""
    group = weights.q.shape[0] // weights.k.shape[0]
    scores = source_scores(x, weights, inv_freq, scaling=scaling, gain=gain)
    attention = causal_softmax(scores, rules=weights.rules)
    v = torch.einsum("ntD,gdD->ngtd", x, weights.v).repeat_interleave(group, 1)
    return torch.einsum("nhtd,hDd->ntD", attention @ v, weights.o)


def _mla_queries_and_cache(x: Tensor, f: LayerFactors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q_nope [N, H, T, d_n], rotated q_pe [N, H, T, d_r], kv_c [N, T, r] and rotated k_pe [N, T, d_r]."""
    positions = torch.arange(x.shape[1], device=x.device)
    q_input = x if f.q_latent is None else x @ f.q_latent.mT
    q_nope = torch.einsum("ntD,hdD->nhtd", q_input, f.q_nope)
    q_pe = rotate(torch.einsum("ntD,hdD->nhtd", q_input, f.q_pe), f.inv_freq, positions)
    return q_nope, q_pe, x @ f.latent.mT, rotate(x @ f.rope.mT, f.inv_freq, positions)


def expanded_attention(x: Tensor, f: LayerFactors) -> Tensor:
    """Return MLA's output with per-head keys and values expanded from the latent; [N, T, D] → [N, T, D]."""
    q_nope, q_pe, kv_c, k_pe = _mla_queries_and_cache(x, f)
    k_nope = torch.einsum("ntr,hdr->nhtd", kv_c, f.k_up)
    value = torch.einsum("ntr,hdr->nhtd", kv_c, f.v_up)
    scores = q_nope @ k_nope.mT + f.rope_gain * (q_pe @ k_pe[:, None].mT)
    return torch.einsum("nhtd,hDd->ntD", causal_softmax(scores * f.scaling, rules=f.rules) @ value, f.o)


def absorbed_attention(x: Tensor, f: LayerFactors) -> Tensor:
    """Return MLA's output as multi-query attention over the latent; [N, T, D] → [N, T, D].

    W_UK is absorbed in the query, and W_UV is applied after the weighted sum (DeepSeek-V2, arXiv 2405.04434, section
    2.1.2).
    """
    q_nope, q_pe, kv_c, k_pe = _mla_queries_and_cache(x, f)
    q_latent = torch.einsum("nhtd,hdr->nhtr", q_nope, f.k_up)
    scores = q_latent @ kv_c[:, None].mT + f.rope_gain * (q_pe @ k_pe[:, None].mT)
    mixed = causal_softmax(scores * f.scaling, rules=f.rules) @ kv_c[:, None]
    return torch.einsum("nhtr,hdr,hDd->ntD", mixed, f.v_up, f.o)
