"""Queries and cached rows on which decode kernels are compared with the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from transmla.kernels import DecodeShape, hopper, triton_decode
from transmla.kernels import reference as plain
from transmla.kernels.rows import Rows, Scores

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
KERNELS = [triton_decode]
if GPU and hopper.refuses(DecodeShape(8, 512, 64, torch.bfloat16, DEVICE)) is None:
    KERNELS.append(hopper)
# The interpreter computes wrong bfloat16 products, so bfloat16 is tested only on a GPU.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SCALING = 0.11


@dataclass
class Case:
    """Queries [B, n, H, ·] and cached rows [B, T, ·], with the rows in one buffer as in the latent cache."""

    q_latent: Tensor
    q_pe: Tensor
    kv_c: Tensor
    k_pe: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(convert(t, dtype) for t in (self.q_latent, self.q_pe, self.kv_c, self.k_pe)))

    def decode(
        self, kernel: ModuleType, mask: Tensor | None = None, softcap: float | None = None, **rows: Tensor
    ) -> Any:
        cached = Rows(self.kv_c, self.k_pe, **rows)
        return kernel.decode(self.q_latent, self.q_pe, cached, Scores(SCALING, mask, softcap))


def convert(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the same view of the same buffer, in another dtype."""
    return t._base.to(dtype).as_strided(t.shape, t.stride(), t.storage_offset())


def case(
    batch: int = 2, new: int = 1, heads: int = 3, total: int = 150, rank: int = 32, width: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    """Random queries and cached rows; the buffer is NaN behind the last row."""
    generator = torch.Generator().manual_seed(batch + 7 * total + rank)
    queries = torch.randn(batch, new, heads, rank + width, generator=generator) * 2
    rows = torch.randn(batch, total + 5, rank + width, generator=generator)
    queries, rows = queries.to(DEVICE, dtype), rows.to(DEVICE, dtype)
    rows[:, total:] = float("nan")
    rows = rows[:, :total]
    return Case(queries[..., :rank], queries[..., rank:], rows[..., :rank], rows[..., rank:])


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make ``allocate`` return memory full of NaN, or of -1 for integers, so that unwritten results are noticed."""

    def allocate_poisoned(*shape: Any, **settings: Any) -> Tensor:
        memory = allocate(*shape, **settings)
        return memory.fill_(float("nan") if memory.is_floating_point() else -1)

    return allocate_poisoned


def compare(kernel: ModuleType, c: Case, *, falls_back: bool = False, **extra: Any) -> None:
    """Compare a kernel's results, written into poisoned memory, with the reference in float64.

    ``falls_back``: the Hopper backend may call the Triton backend; otherwise that call is an error.
    """
    dtype = c.kv_c.dtype
    if dtype not in kernel.DTYPES:
        dtype = kernel.DTYPES[0]
        c = c.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        if kernel is hopper and not falls_back:
            patch.setattr(triton_decode, "decode", None)
        actual = c.decode(kernel, **extra)
    expected = c.to(torch.float64).decode(plain, **extra)
    for ours, theirs, name in zip(actual, expected, ("output", "log-sum-exp"), strict=True):
        blind = theirs == float("-inf")
        assert torch.equal(blind, ours == float("-inf")), name
        difference = (ours.double() - theirs).masked_fill(blind, 0).abs().max()
        assert difference < TOLERANCE[dtype] * max(1.0, float(theirs.masked_fill(blind, 0).abs().max())), name
