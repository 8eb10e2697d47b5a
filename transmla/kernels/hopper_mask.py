"""Which rows a program of the Hopper kernel reads, and which of them need no mask."""

from __future__ import annotations

from typing import Any

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
except ImportError:  # Triton is missing or older than 3.6
    gluon = None

mask_bounds: Any = None

if gluon is not None:

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
    def mask_bounds(mask, batch, mask_batch, mask_query, mask_token, total, NEW: gl.constexpr):
        """Ranges of a mask [NEW, total]: first, last, low, high.

        Every token that some query attends to lies in [first, last). Every query attends to all of [low, high), which
        may be empty.
        """
        CHUNK: gl.constexpr = 2048
        layout: gl.constexpr = gl.BlockedLayout([16], [32], [4], [0])
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
