"""Number of cache splits that run in parallel (Flash-Decoding, Dao et al. 2023), and the merge of their results."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # a CPU build of torch has no Triton
    triton = None

# Cost model, in units of the time for one tile: fixed cost of a program; cost of writing and reading one partial
# result, which all multiprocessors share; cost of the merge kernel.
PROGRAM_COST, PART_COST, MERGE_COST = 4.0, 8.0, 3.0
# Values in the registers of one program of the merge kernel.
MERGED = 4096
# Pieces of a sequence that are merged at once, if sequences have different numbers of pieces.
MERGED_PIECES = 8
# Number of multiprocessors assumed for a CPU, where Triton's interpreter runs the kernels.
CPU_UNITS = 4

if triton is not None:

    @triton.jit(do_not_specialize=["splits"])
    def _merge(
        parts, part_lse, pieces, out, lse, rows, splits, log, RANK: tl.constexpr, COLUMNS: tl.constexpr,
        SPLITS: tl.constexpr, DIVIDED: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """Average the partial results of one query row, for some columns, weighted by their shares of the softmax."""
        if EARLY:
            # This kernel launches while the last programs of the splits still run, which hides the launch.
            gdc_wait()
        row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
        first, count = batch * splits, splits
        if DIVIDED:
            first, count = tl.load(pieces + batch * 2).to(tl.int64), tl.load(pieces + batch * 2 + 1)
            if count == 1:
                return
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        best, total = float("-inf"), 0.0
        mixed = tl.zeros([COLUMNS], tl.float32)
        for at in range(0, count, SPLITS):
            split = at + tl.arange(0, SPLITS)
            source = first * rows + row + split * rows
            split_lse = tl.load(part_lse + source, mask=split < count, other=float("-inf"))
            inside = (split < count)[:, None] & (column < RANK)
            part = tl.load(parts + source[:, None] * RANK + column, mask=inside, other=0.0)
            higher = tl.maximum(best, tl.max(split_lse))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            share, shrink = tl.exp2(split_lse - shift), tl.exp2(best - shift)
            total = total * shrink + tl.sum(share)
            mixed = mixed * shrink + tl.sum(part * share[:, None], 0)
            best = higher
        attends = total > 0
        total = tl.where(attends, total, 1.0)
        target = batch * rows + row
        tl.store(out + target * RANK + column, (mixed / total).to(out.dtype.element_ty), mask=column < RANK)
        if tl.program_id(1) == 0:
            tl.store(lse + target, tl.where(attends, (best + tl.log2(total)) * log, float("-inf")))


def allocate_results(q_latent: Tensor, splits: int, pieces: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results for queries ``q_latent`` [B, n, H, r], and the partial results.

    Args:
        q_latent: the queries.
        splits: number of splits of each sequence.
        pieces: number of partial results of all sequences together; None: every sequence has ``splits``.

    Returns:
        Outputs [B, n, H, r]; log-sum-exps [B, n, H]; outputs of the splits [B, splits, n H, r] or of the pieces
        [pieces, n H, r], in float32; their log-sum-exps. With one split, the last two are the first two.
    """
    batch, new, heads, rank = q_latent.shape
    out = torch.empty_like(q_latent)
    lse = torch.empty(batch, new, heads, dtype=torch.float32, device=q_latent.device)
    if splits == 1 and pieces is None:
        return out, lse, out, lse
    count = (batch, splits) if pieces is None else (pieces,)
    parts = torch.empty(*count, new * heads, rank, dtype=torch.float32, device=q_latent.device)
    return out, lse, parts, torch.empty(parts.shape[:-1], dtype=torch.float32, device=q_latent.device)


def merge_splits(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge the results of the splits, in place.

    Args:
        parts: outputs of the splits [B, splits, n H, r].
        part_lse: their log-sum-exps [B, splits, n H], to base 2.
        out: receives the outputs [B, n, H, r].
        lse: receives the log-sum-exps [B, n, H], to base e.
    """
    _launch_merge(parts, part_lse, None, out, lse, triton.next_power_of_2(parts.shape[1]))


def merge_pieces(parts: Tensor, part_lse: Tensor, pieces: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge the results of the pieces of every sequence, in place. A sequence with one piece keeps its result.

    Args:
        parts: outputs of the pieces [parts, n H, r].
        part_lse: their log-sum-exps [parts, n H], to base 2.
        pieces: first part and number of pieces of each sequence [B, 2], in int32.
        out: receives the outputs [B, n, H, r].
        lse: receives the log-sum-exps [B, n, H], to base e.
    """
    _launch_merge(parts, part_lse, pieces, out, lse, MERGED_PIECES)


def _launch_merge(
    parts: Tensor, part_lse: Tensor, pieces: Tensor | None, out: Tensor, lse: Tensor, height: int
) -> None:
    """Launch the merge kernel, which merges ``height`` parts at once; other arguments as above."""
    rows, rank = parts.shape[-2:]
    columns = min(triton.next_power_of_2(rank), max(16, MERGED // height))
    early = _launches_early(parts.device)
    _merge[(rows, math.ceil(rank / columns), out.shape[0])](
        parts=parts,
        part_lse=part_lse,
        pieces=parts if pieces is None else pieces,
        out=out,
        lse=lse,
        rows=rows,
        splits=parts.shape[-3],
        log=math.log(2),
        RANK=rank,
        COLUMNS=columns,
        SPLITS=height,
        DIVIDED=pieces is not None,
        EARLY=early,
        num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of ``device``."""
    if device.type != "cuda":
        return CPU_UNITS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _launches_early(device: torch.device) -> bool:
    """Whether a kernel may launch while the previous one still runs (programmatic dependent launch, from Hopper on)."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def best_splits(programs: int, tiles: int, device: torch.device) -> int:
    """Return the number of splits with the lowest estimated time.

    Args:
        programs: programs of one split. A multiprocessor runs one program at a time.
        tiles: cache tiles of a sequence.
        device: device that runs the kernel.
    """
    units = multiprocessors(device)

    def cost(splits: int) -> float:
        rounds = math.ceil(programs * splits / units)
        merge = MERGE_COST + PART_COST * programs * splits / units if splits > 1 else 0.0
        return rounds * (math.ceil(tiles / splits) + PROGRAM_COST) + merge

    return min(range(1, max(1, min(tiles, units)) + 1), key=cost)


def longest_queue(programs: int, tiles: int, splits: int, device: torch.device) -> int:
    """Return the largest number of tiles that a multiprocessor reads; arguments as in ``best_splits``."""
    return math.ceil(programs * splits / multiprocessors(device)) * math.ceil(tiles / splits)
