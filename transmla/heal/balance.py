"""Rescale factors that are multiplied with each other to equal size. The attention's output does not change.

Three products allow this, because one factor can be scaled up and the other down by the same amount:

- a q_nope row times the key row of W_UK with the same head and index,
- the rotary query rows of one frequency times the cached rotary key rows of that frequency,
- all latents times ``kv_b_proj``, which reads them.

A conversion chooses these scales for other purposes: query rows of a rarely used rotary frequency may be 1000 times
larger than other rows. Healing uses one learning rate per tensor, so the rows of a tensor must have similar sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Some rows of one projection: views of its weight and, if it has a bias, of the bias as one more column.
Part = list[Tensor]


@torch.no_grad()
def balance(attention: Any, *, interleaved: bool) -> None:
    """Balance queries, keys and cached rows of one MLA layer, in place.

    All latents are scaled by one common factor, and only if no RMSNorm lies between them and ``kv_b_proj``. A separate
    factor for each latent, with values balanced against ``o_proj``, did not heal better: held-out KL 0.299 instead of
    0.292 nats (SmolLM2-135M, 30 steps).

    Args:
        attention: the MLA module of an export, with ``kv_b_proj`` [H·(d_nope + d_v), r].
        interleaved: whether the two rows of a rotary frequency are neighbours (native exports). Otherwise they are
            d_r / 2 rows apart.
    """
    nope_dim, rank = attention.qk_nope_head_dim, attention.kv_lora_rank
    query_rows = _rows(getattr(attention, "q_b_proj", None) or attention.q_proj)
    cached, readers = _rows(attention.kv_a_proj_with_mqa), _rows(attention.kv_b_proj)
    queries = _view(query_rows, lambda t: t.unflatten(0, (attention.num_heads, -1)))
    expanded = _view(readers, lambda t: t.unflatten(0, (attention.num_heads, -1)))
    keys, values = _view(expanded, lambda t: t[:, :nope_dim]), _view(expanded, lambda t: t[:, nope_dim:])
    q_nope, latents = _view(queries, lambda t: t[:, :nope_dim]), _view(cached, lambda t: t[:rank])
    # [H, d_r / 2, 2, ·] for queries; [1, d_r / 2, 2, ·] for the cached rotary key, which all heads share.
    q_pe = _view(queries, lambda t: _rotary_pairs(t[:, nope_dim:], interleaved))
    k_pe = _view(cached, lambda t: _rotary_pairs(t[None, rank:], interleaved))

    _balance_product(q_nope, keys, (2,))
    _balance_product(q_pe, k_pe, (0, 2, 3))
    # Then balance the parts inside each tensor: keys as large as values, rotary queries as large as q_nope,
    # latents as large as rotary keys.
    _scale_up(keys, q_nope, _rms(values) / _rms(keys))
    _scale_up(q_pe, k_pe, _rms(q_nope) / _rms(q_pe))
    if not hasattr(attention.kv_a_layernorm, "weight"):
        _scale_up(latents, readers, _rms(k_pe) / _rms(latents))


def _rows(projection: Any) -> Part:
    """Return the weight [N, D] of a projection, and its bias as a column [N, 1]."""
    return [projection.weight] if projection.bias is None else [projection.weight, projection.bias[:, None]]


def _view(part: Part, view: Callable[[Tensor], Tensor]) -> Part:
    return [view(tensor) for tensor in part]


def _rotary_pairs(rows: Tensor, interleaved: bool) -> Tensor:
    """View rotary rows [H, d_r, ·] as [H, d_r / 2, 2, ·]: the last but one index is the row of a frequency."""
    return rows.unflatten(1, (-1, 2)) if interleaved else rows.unflatten(1, (2, -1)).transpose(1, 2)


def _balance_product(left: Part, right: Part, dims: tuple[int, ...]) -> None:
    """Give both factors of a product equal size. ``dims`` share one scale; each other index gets a separate one."""
    _scale_up(left, right, (_rms(right, dims) / _rms(left, dims)).sqrt())


def _scale_up(left: Part, right: Part, factor: Tensor) -> None:
    """Multiply ``left`` and divide ``right`` by ``factor``; rows of zeros, which have no valid factor, stay."""
    factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)
    for tensor in left:
        tensor.mul_(factor)
    for tensor in right:
        tensor.div_(factor)


def _rms(part: Part, dims: tuple[int, ...] | None = None) -> Tensor:
    """Return the root mean square over ``dims``, which stay with size 1; over all dimensions if None."""
    return torch.cat(part, -1).square().mean(dims, keepdim=dims is not None).sqrt()
