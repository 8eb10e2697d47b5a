"""What meets in a product made equally large, and the parts of a tensor too, without changing what attention computes.

A factor can move between a query's row and the row of the key up-projection that it meets, between the queries and the
cached keys of one rotary frequency, and between all latents and what reads them. Conversions use this freedom for their
own ends: queries of a rare rotary frequency may be a thousand times as large as others. But a tensor has one learning
rate, which fits its rows only if they are of about one size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A part of one projection: rows of its weight, and of its bias as one more column.
Part = list[Tensor]


@torch.no_grad()
def balance(attention: Any, *, interleaved: bool) -> None:
    """Balance queries, keys and cached rows of an export's attention, in place.

    The two rows of a rotary frequency stand side by side (``interleaved``, native exports), or half the rotary rows
    apart. Latents change their scale together, so they stay where a norm stands between them and their readers.
    Balanced one by one, and values against the output projection, they heal no better (SmolLM2-135M, 30 steps: a KL of
    0.299, not 0.292).
    """
    plain, rank = attention.qk_nope_head_dim, attention.kv_lora_rank
    queries = _rows(getattr(attention, "q_b_proj", None) or attention.q_proj)
    cached, readers = _rows(attention.kv_a_proj_with_mqa), _rows(attention.kv_b_proj)
    heads = _each(queries, lambda t: t.unflatten(0, (attention.num_heads, -1)))
    reading = _each(readers, lambda t: t.unflatten(0, (attention.num_heads, -1)))
    keys, values = _each(reading, lambda t: t[:, :plain]), _each(reading, lambda t: t[:, plain:])
    q_nope, latents = _each(heads, lambda t: t[:, :plain]), _each(cached, lambda t: t[:rank])
    # Both rows of a frequency; what is cached has one head.
    q_pe = _each(heads, lambda t: _pairs(t[:, plain:], interleaved))
    pe = _each(cached, lambda t: _pairs(t[None, rank:], interleaved))

    _meet(q_nope, keys, (2,))
    _meet(q_pe, pe, (0, 2, 3))
    # Then the parts of one tensor among each other: keys as large as values, rotary queries as the plain ones, latents
    # as rotary keys.
    _move(keys, q_nope, _size(values) / _size(keys))
    _move(q_pe, pe, _size(q_nope) / _size(q_pe))
    if not hasattr(attention.kv_a_layernorm, "weight"):
        _move(latents, readers, _size(pe) / _size(latents))


def _rows(projection: Any) -> Part:
    return [projection.weight] if projection.bias is None else [projection.weight, projection.bias[:, None]]


def _each(part: Part, view: Callable[[Tensor], Tensor]) -> Part:
    return [view(tensor) for tensor in part]


def _pairs(rows: Tensor, interleaved: bool) -> Tensor:
    """Rotary rows [H, d_r, ·] as [H, d_r / 2, 2, ·]."""
    return rows.unflatten(1, (-1, 2)) if interleaved else rows.unflatten(1, (2, -1)).transpose(1, 2)


def _meet(left: Part, right: Part, dims: tuple[int, ...]) -> None:
    """Make both sides of a product equally large, for every index that ``dims`` leaves."""
    _move(left, right, (_size(right, dims) / _size(left, dims)).sqrt())


def _move(left: Part, right: Part, factor: Tensor) -> None:
    """Move ``factor`` to the left; one that is none, of rows that are nothing, stays where it was."""
    factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)
    for tensor in left:
        tensor.mul_(factor)
    for tensor in right:
        tensor.div_(factor)


def _size(part: Part, dims: tuple[int, ...] | None = None) -> Tensor:
    """Root mean square over ``dims``, which stay as 1."""
    return torch.cat(part, -1).square().mean(dims, keepdim=dims is not None).sqrt()
