"""Which rows a program of the Hopper kernel reads, and which of them need no mask."""

from __future__ import annotations

from typing import Any

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
except ImportError:  # Triton is missing or older than 3.6
    gluon = None

# Warps of a program that finds the bounds of one sequence, and of the warp group that does so in ``attend``.
BOUND_WARPS, GROUP_WARPS = 16, 4

assignment: Any = None
find_bounds: Any = None

if gluon is not None:
    # Kernels can read a global of this module only if it is a constexpr.
    _BOUND_WARPS, _GROUP_WARPS = gl.constexpr(BOUND_WARPS), gl.constexpr(GROUP_WARPS)

    @gluon.jit
    def _seen(row, at, mask_token, total, lane):
        keys = at + lane
        return gl.load(row + keys.to(gl.int64) * mask_token, mask=keys < total, other=0)

    @gluon.jit
    def _noted(shown, keys, begins, ends, counts):
        seen = shown != 0
        begins = gl.where(seen, gl.minimum(begins, keys), begins)
        return begins, gl.where(seen, keys + 1, ends), counts + seen.to(gl.int32)

    @gluon.jit
    def _mask_bounds(
        mask, batch, mask_batch, mask_query, mask_token, total, NEW: gl.constexpr, WARPS: gl.constexpr
    ):  # fmt: skip
        """Ranges of a mask [NEW, total]: first, last, low, high.

        Every token that some query attends to lies in [first, last). Every query attends to all of [low, high), which
        may be empty.
        """
        CHUNK: gl.constexpr = 512 * WARPS
        layout: gl.constexpr = gl.BlockedLayout([16], [32], [WARPS], [0])
        first, last, low, high, holes = total, 0, 0, total, 0
        lane = gl.arange(0, CHUNK, layout=layout)
        for query in range(NEW):
            begins = total + lane * 0
            ends = lane * 0
            counts = lane * 0
            row = mask + batch.to(gl.int64) * mask_batch + query * mask_query
            for at in range(0, total, 4 * CHUNK):
                # All four loads come before the first use, so that they share one memory latency.
                one, two = _seen(row, at, mask_token, total, lane), _seen(row, at + CHUNK, mask_token, total, lane)
                three = _seen(row, at + 2 * CHUNK, mask_token, total, lane)
                four = _seen(row, at + 3 * CHUNK, mask_token, total, lane)
                begins, ends, counts = _noted(one, at + lane, begins, ends, counts)
                begins, ends, counts = _noted(two, at + CHUNK + lane, begins, ends, counts)
                begins, ends, counts = _noted(three, at + 2 * CHUNK + lane, begins, ends, counts)
                begins, ends, counts = _noted(four, at + 3 * CHUNK + lane, begins, ends, counts)
            begin, end, count = gl.min(begins, 0), gl.max(ends, 0), gl.sum(counts, 0)
            holes += gl.maximum(end - begin, 0) - count
            first, last = gl.minimum(first, begin), gl.maximum(last, end)
            low, high = gl.maximum(low, begin), gl.minimum(high, end)
        return gl.minimum(first, last), last, low, gl.where(holes == 0, high, 0)

    @gluon.jit(do_not_specialize=["total"])
    def find_bounds(
        mask, lengths, bounds, total, lengths_batch, mask_batch, mask_query, mask_token, NEW: gl.constexpr,
        RAGGED: gl.constexpr,
    ):  # fmt: skip
        """Write the four bounds of one sequence's mask to ``bounds`` [B, 4]."""
        batch = gl.program_id(0)
        length = total
        if RAGGED:
            length = gl.load(lengths + batch * lengths_batch)
        begin, end, low, high = _mask_bounds(
            mask, batch, mask_batch, mask_query, mask_token, length, NEW, _BOUND_WARPS
        )  # fmt: skip
        gl.store(bounds + batch * 4, begin)
        gl.store(bounds + batch * 4 + 1, end)
        gl.store(bounds + batch * 4 + 2, low)
        gl.store(bounds + batch * 4 + 3, high)

    @gluon.jit
    def assignment(
        mask, lengths, slots, bounds, rows, total, splits, lengths_batch, mask_batch, mask_query, mask_token,
        NEW: gl.constexpr, TOKENS: gl.constexpr, MASKED: gl.constexpr, RAGGED: gl.constexpr, DIVIDED: gl.constexpr,
    ):  # fmt: skip
        """Return what this program does.

        The results are: sequence, number of the partial result, query rows, rows of the sequence, first and end of the
        tiles, first and end of the tokens that need no mask. The number is -1 if the result needs no merge. An unused
        slot has no query rows.
        """
        if DIVIDED:
            slot = slots + gl.program_id(1) * 4
            batch, first, last, unit = gl.load(slot), gl.load(slot + 1), gl.load(slot + 2), gl.load(slot + 3)
            rows = gl.where(first < last, rows, 0)
        else:
            split, batch = gl.program_id(1), gl.program_id(2)
            unit = batch * splits + split
        length = total
        if RAGGED:
            length = gl.load(lengths + batch * lengths_batch)
        begin, end, low = 0, length, 0
        high = length - NEW + 1 if RAGGED else length
        if MASKED:
            if DIVIDED:
                low, shown = gl.load(bounds + batch * 4 + 2), gl.load(bounds + batch * 4 + 3)
            else:
                begin, end, low, shown = _mask_bounds(
                    mask, batch, mask_batch, mask_query, mask_token, length, NEW, _GROUP_WARPS
                )  # fmt: skip
            high = gl.minimum(high, shown) if RAGGED else shown
        if not DIVIDED:
            begin = begin // TOKENS
            tiles = gl.maximum((end + TOKENS - 1) // TOKENS - begin, 0)
            first = begin + split * tiles // splits
            last = begin + (split + 1) * tiles // splits
        return batch, unit, rows, length, first, last, low, high
