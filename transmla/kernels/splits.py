"""Cutting a cache into splits that are attended to side by side (Flash-Decoding, Dao et al. 2023), and merging them."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # a CPU build of torch comes without
    triton = None

# In tiles of work: what a program costs beside its tiles, what writing and reading its part does to the whole device,
# and what the merge costs.
PROGRAM_COST, PART_COST, MERGE_COST = 4.0, 8.0, 3.0
# Values that a program of the merge holds.
MERGED = 4096
# What stands for a device's multiprocessors where there is none.
CPU_UNITS = 4

if triton is not None:

    @triton.jit(do_not_specialize=["splits"])
    def _merge(
        parts, part_lse, out, lse, rows, splits, log, RANK: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
        EARLY: tl.constexpr,
    ):  # fmt: skip
        """Some columns of one query row: its splits, weighted by their shares of the softmax."""
        if EARLY:
            # Launched while the splits' last programs end, so that the launch itself costs less.
            gdc_wait()
        row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        split = tl.arange(0, SPLITS)
        place = batch * splits * rows + row + split * rows
        found = tl.load(part_lse + place, mask=split < splits, other=float("-inf"))
        inside = (split < splits)[:, None] & (column < RANK)
        part = tl.load(parts + place[:, None] * RANK + column, mask=inside, other=0.0)
        top = tl.max(found)
        share = tl.exp2(found - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(share)
        some = total > 0
        total = tl.where(some, total, 1.0)
        mean = tl.sum(part * share[:, None], 0) / total
        at = batch * rows + row
        tl.store(out + at * RANK + column, mean.to(out.dtype.element_ty), mask=column < RANK)
        if tl.program_id(1) == 0:
            tl.store(lse + at, tl.where(some, (top + tl.log2(total)) * log, float("-inf")))


def allocate_results(q_latent: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the result of ``q_latent`` [B, n, H, r] and for what programs write.

    Returns the means [B, n, H, r] and log-sum-exps [B, n, H]; then both of every split, [B, splits, n H, r] and
    [B, splits, n H] in float32, which for one split are the same.
    """
    batch, new, heads, rank = q_latent.shape
    out = torch.empty_like(q_latent)
    lse = torch.empty(batch, new, heads, dtype=torch.float32, device=q_latent.device)
    if splits == 1:
        return out, lse, out, lse
    parts = torch.empty(batch, splits, new * heads, rank, dtype=torch.float32, device=q_latent.device)
    return out, lse, parts, torch.empty(parts.shape[:-1], dtype=torch.float32, device=q_latent.device)


def merge_splits(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge ``parts`` [B, splits, rows, r] into ``out``, and their log-sum-exps, to base 2, into ``lse``, to base e."""
    batch, splits, rows, rank = parts.shape
    height = triton.next_power_of_2(splits)
    columns = min(triton.next_power_of_2(rank), max(16, MERGED // height))
    early = _launches_early(parts.device)
    _merge[(rows, math.ceil(rank / columns), batch)](
        parts=parts,
        part_lse=part_lse,
        out=out,
        lse=lse,
        rows=rows,
        splits=splits,
        log=math.log(2),
        RANK=rank,
        COLUMNS=columns,
        SPLITS=height,
        EARLY=early,
        num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_UNITS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _launches_early(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it still runs (from Hopper on)."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def best_splits(programs: int, tiles: int, device: torch.device) -> int:
    """Splits of ``tiles`` tiles after which ``programs`` programs a split are done first, one a multiprocessor."""
    units = _multiprocessors(device)

    def cost(splits: int) -> float:
        rounds = math.ceil(programs * splits / units)
        merge = MERGE_COST + PART_COST * programs * splits / units if splits > 1 else 0.0
        return rounds * (math.ceil(tiles / splits) + PROGRAM_COST) + merge

    return min(range(1, max(1, min(tiles, units)) + 1), key=cost)
