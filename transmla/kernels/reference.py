"""Decoding in plain PyTorch, on any device and in any dtype. Tests compare every kernel with this backend."""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.kernels import Backend, DecodeShape
from transmla.kernels.rows import Rows, Scores


def decode(q_latent: Tensor, q_pe: Tensor, rows: Rows, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attend to the latent rows as multi-query attention; arguments and results as in ``Decode``.

    A query that may attend to no row gets zeros [r] and a log-sum-exp of minus infinity.
    """
    batch, new, heads, rank = q_latent.shape
    (kv_c, k_pe), total, lengths, mask = rows.full(), rows.total, rows.lengths, scores.mask
    if rows.block_table is not None:
        kv_c, k_pe = (pages[rows.block_table.long()].flatten(1, 2) for pages in (kv_c, k_pe))
    if lengths is not None:
        ends = lengths[:, None] - new + 1 + torch.arange(new, device=lengths.device)
        causal = (torch.arange(total, device=lengths.device) < ends[..., None])[:, None]
        mask = causal if mask is None else mask & causal
        # Memory behind the end may hold NaN, and zero times NaN is not zero.
        valid = torch.arange(total, device=lengths.device) < lengths[:, None]
        kv_c = kv_c.masked_fill(~valid[..., None], 0)
    exact = torch.promote_types(kv_c.dtype, torch.float32)
    logits = torch.baddbmm(q_pe.flatten(1, 2) @ k_pe.mT, q_latent.flatten(1, 2), kv_c.mT)
    logits = (logits.to(exact) * scores.scaling).view(batch, new, heads, total)
    if scores.softcap is not None:
        logits = scores.softcap * (logits / scores.softcap).tanh()
    if mask is not None:
        logits = logits.masked_fill(~mask.transpose(1, 2), float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.clamp_min(torch.finfo(exact).min)[..., None]).exp()
    mixed = weights.to(kv_c.dtype).flatten(1, 2) @ kv_c
    return mixed.view(batch, new, heads, rank), lse


def refuses(shape: DecodeShape) -> str | None:
    """Return None: plain PyTorch serves every shape."""
    return None


BACKEND = Backend("torch", "plain PyTorch, any device", preference=0, refuses=refuses, decode=decode)
