"""Division of a batch whose sequences have different lengths: its work is split by tiles, not by sequences.

Equal splits of every sequence would let the longest sequence decide the time. Here every sequence is cut into pieces
of one common length and a shorter last piece, so that long sequences have more pieces. The lengths stay on the device:
one small program chooses the piece length and lists the pieces, and each program of the decode kernel reads one entry
of this list.

A multiprocessor runs one program at a time and then takes the next one of the list. Let the pieces longer than half
the piece length L come first, and count each as 1 and every other piece as 1/2. If the sum is at most k times the
number of multiprocessors, all pieces end within the time of k pieces of length L: a later start of the last piece
would need more pieces before it. For t tiles of a sequence, the count is ceil(2 t / L) / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.kernels.splits import PART_COST, PROGRAM_COST, multiprocessors

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch has no Triton
    triton = None

# Largest batch that the planning program holds in its registers.
MAX_BATCH = 1024
# Numbers of rounds k that are compared, from the smallest possible one on.
ROUNDS = 4
# Pieces that are listed at once, over all sequences.
LISTED = 512

if triton is not None:
    # Kernels can read a global of this module only if it is a constexpr.
    _PROGRAM_COST, _PART_COST = tl.constexpr(PROGRAM_COST), tl.constexpr(PART_COST)

    @triton.jit
    def _piece_length(tiles, extra, units, blocks, steps, ROUNDS: tl.constexpr):
        """Return the piece length with the lowest estimated time, for ``tiles`` [B] of the sequences.

        There are at most ``extra`` pieces more than sequences that have a tile.
        """
        longest = tl.maximum(tl.max(tiles, 0), 1)
        most = tl.sum((tiles > 0).to(tl.int32), 0) + extra
        fewest = tl.cdiv(tl.cdiv(tl.sum(tl.cdiv(2 * tiles, longest), 0), 2) * blocks, units)
        index = tl.arange(0, ROUNDS)
        rounds = fewest + index
        places = rounds * units // blocks
        low, high = index * 0 + 1, index * 0 + longest
        # Bisection for the smallest length of every number of rounds. ``high`` always fits.
        for _ in range(steps):
            middle = (low + high) // 2
            halves = tl.cdiv(2 * tiles[:, None], middle[None, :])
            fits = (tl.sum(halves, 0) <= 2 * places) & (tl.sum((halves + 1) // 2, 0) <= most)
            low, high = tl.where(fits, low, middle + 1), tl.where(fits, middle, high)
        counts = tl.cdiv(tiles[:, None], high[None, :])
        parts = tl.sum(tl.where(counts > 1, counts, 0), 0)
        cost = rounds * (high + _PROGRAM_COST) + parts * (_PART_COST * blocks / units)
        return tl.sum(tl.where(index == tl.argmin(cost, 0), high, 0), 0)

    # These arguments change between calls, and must not trigger recompilation.
    @triton.jit(do_not_specialize=["batch", "places", "extra", "steps"])
    def _divide(
        lengths, bounds, slots, pieces, lengths_batch, batch, places, extra, units, blocks, steps, BATCH: tl.constexpr,
        TOKENS: tl.constexpr, CHUNK: tl.constexpr, ROUNDS: tl.constexpr, BOUNDED: tl.constexpr,
    ):  # fmt: skip
        """Choose the piece length and write ``slots`` and ``pieces``; see ``Division``."""
        sequence = tl.arange(0, BATCH)
        inside = sequence < batch
        if BOUNDED:
            begin = tl.load(bounds + sequence * 4, mask=inside, other=0) // TOKENS
            end = tl.load(bounds + sequence * 4 + 1, mask=inside, other=0)
        else:
            begin = sequence * 0
            end = tl.load(lengths + sequence * lengths_batch, mask=inside, other=0)
        tiles = tl.maximum(tl.cdiv(end, TOKENS) - begin, 0)
        length = _piece_length(tiles, extra, units, blocks, steps, ROUNDS)
        count = tl.cdiv(tiles, length)
        rest = tiles % length
        small = ((rest > 0) & (2 * rest <= length)).to(tl.int32)
        large = count - small
        # Positions in the list, where the large pieces of all sequences come first; and numbers of partial results.
        first_large = tl.cumsum(large, 0) - large
        only_small = tl.sum(large, 0) + tl.cumsum(small, 0) - small
        merged = tl.where(count > 1, count, 0)
        first_part = tl.cumsum(merged, 0) - merged
        tl.store(pieces + sequence * 2, first_part, mask=inside)
        tl.store(pieces + sequence * 2 + 1, count, mask=inside)
        for at in range(0, tl.max(count, 0), CHUNK):
            piece = at + tl.arange(0, CHUNK)[None, :]
            held = piece < count[:, None]
            place = tl.where(piece < large[:, None], first_large[:, None] + piece, only_small[:, None])
            first = piece * length
            last = tl.minimum(first + length, tiles[:, None])
            part = tl.where(count[:, None] > 1, first_part[:, None] + piece, -1)
            slot = slots + place * 4
            tl.store(slot, sequence[:, None] + piece * 0, mask=held)
            tl.store(slot + 1, begin[:, None] + first, mask=held)
            tl.store(slot + 2, begin[:, None] + last, mask=held)
            tl.store(slot + 3, part, mask=held)
        for at in range(tl.sum(count, 0) * 4, places * 4, BATCH):
            tl.store(slots + at + sequence, sequence * 0, mask=at + sequence < places * 4)


@dataclass(frozen=True)
class Division:
    """Pieces of all sequences, in int32 on the device.

    Attributes:
        slots: [P, 4]: sequence, first tile, end of the tiles, and number of the partial result, for each program of a
            block of query rows. The number is -1 if the piece is a whole sequence, whose result needs no merge. Unused
            slots at the end have no tile.
        pieces: [B, 2]: number of a sequence's first partial result, and number of its pieces. The partial results of a
            sequence follow each other.
        parts: upper bound of the number of partial results.
    """

    slots: Tensor
    pieces: Tensor
    parts: int


def differ(batch: int, lengths: Tensor | None, mask: Tensor | None) -> bool:
    """Whether sequences may have different numbers of visible rows, as far as is known without reading the device.

    Args:
        batch: number of sequences B.
        lengths: [B], or None. Lengths with stride 0 are equal.
        mask: [B, 1, n, T], or None. A mask with stride 0 is the same for all sequences.
    """
    by_length = lengths is not None and lengths.stride(0) != 0
    by_mask = mask is not None and mask.stride(0) != 0
    return 1 < batch <= MAX_BATCH and (by_length or by_mask)


def divide(batch: int, blocks: int, tokens: int, total: int, lengths: Tensor | None, bounds: Tensor | None) -> Division:
    """Divide the tiles of all sequences into pieces.

    Args:
        batch: number of sequences B, at most ``MAX_BATCH``.
        blocks: programs per piece, one for each block of query rows.
        tokens: tokens of a tile.
        total: largest possible number of rows of a sequence.
        lengths: rows of the sequences [B], in int32 with any stride. Used if there are no ``bounds``.
        bounds: ranges of the sequences [B, 4] in int32; the first two columns are the first and end of the visible
            rows.
    """
    given = lengths if bounds is None else bounds
    assert given is not None
    units = multiprocessors(given.device)
    extra = 2 * max(1, units // blocks)
    places = batch + extra
    slots = torch.empty(places, 4, dtype=torch.int32, device=given.device)
    pieces = torch.empty(batch, 2, dtype=torch.int32, device=given.device)
    _divide[(1,)](
        lengths=given,
        bounds=given,
        slots=slots,
        pieces=pieces,
        lengths_batch=given.stride(0),
        batch=batch,
        places=places,
        extra=extra,
        units=units,
        blocks=blocks,
        steps=triton.cdiv(total, tokens).bit_length(),
        TOKENS=tokens,
        ROUNDS=ROUNDS,
        BOUNDED=bounds is not None,
        **launch_sizes(batch),
    )
    # A sequence with c > 1 pieces has c ≤ 2 (c - 1) partial results, and the sum of all c - 1 is at most ``extra``.
    return Division(slots, pieces, min(places, 2 * extra))


def launch_sizes(batch: int) -> dict[str, int]:
    """Return sizes of the planning program: sequences, pieces per sequence that are listed at once, and warps."""
    width = max(16, triton.next_power_of_2(batch))
    return {"BATCH": width, "CHUNK": max(4, LISTED // width), "num_warps": min(8, max(1, width // 32))}
