"""What meets in a product made equally large, and the parts of a tensor too, without changing what attention computes.

A factor can move between a query's row and the row of the key up-projection that it meets, between the queries and the
cached keys of one rotary frequency, and between all latents and what reads them. Conversions use this freedom for their
own ends: queries of a rare rotary frequency may be a thousand times as large as others. But a tensor has one learning
rate, which fits its rows only if they are of about one size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def balance(attention: Any) -> None:
    """Balance queries, keys and cached rows of an export's attention, in place.

    Latents change their scale together, so no norm may stand between them and their readers. Balanced one by one, and
    values against the output projection, they heal no better (SmolLM2-135M, 30 steps: a KL of 0.299, not 0.292).
    """
    readers, cached = attention.kv_b_proj.weight, attention.kv_a_proj_with_mqa.weight
    queries = (attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj).weight
    plain, turned, rank = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.kv_lora_rank
    heads = queries.unflatten(0, (-1, plain + turned))
    reading = readers.unflatten(0, (len(heads), -1))
    keys, values = reading[:, :plain], reading[:, plain:]
    # A rotary frequency has two rows, side by side; what is cached has one head.
    q_pe = heads[:, plain:].unflatten(1, (-1, 2))
    pe = cached[rank:].unflatten(0, (-1, 2))[None]
    q_nope, latents = heads[:, :plain], cached[:rank]

    _meet(q_nope, keys, (2,))
    _meet(q_pe, pe, (0, 2, 3))
    # Then the parts of one tensor among each other: keys as large as values, rotary queries as the plain ones, latents
    # as rotary keys.
    _move(keys, q_nope, _size(values) / _size(keys))
    _move(q_pe, pe, _size(q_nope) / _size(q_pe))
    _move(latents, readers, _size(pe) / _size(latents))


def _meet(left: Tensor, right: Tensor, dims: tuple[int, ...]) -> None:
    """Make both sides of a product equally large, for every index that ``dims`` leaves."""
    _move(left, right, (_size(right, dims) / _size(left, dims)).sqrt())


def _move(left: Tensor, right: Tensor, factor: Tensor) -> None:
    """Move ``factor`` to the left; one that is none, of rows that are nothing, stays where it was."""
    factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)
    left.mul_(factor)
    right.div_(factor)


def _size(x: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Root mean square over ``dims``, which stay as 1."""
    return x.square().mean(dims, keepdim=dims is not None).sqrt()
