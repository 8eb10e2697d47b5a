"""Tiles of the Hopper kernel: loads of the cache and of the queries, rows to clear, and results to store."""

from __future__ import annotations

from typing import Any

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
except ImportError:  # Triton is missing or older than 3.6
    gluon = None

# Query rows (token, head) of one program.
ROWS = 64

HEIGHT: Any = None
clear: Any = None
fetch: Any = None
first_row: Any = None
following: Any = None
group_barrier: Any = None
keep_sums: Any = None
previous: Any = None
reinterpret: Any = None
stage: Any = None

if gluon is not None:
    # Kernels can read a global of a module only if it is a constexpr.
    HEIGHT = gl.constexpr(ROWS)
    # Triton 3.6 and 3.9 use different names for these functions.
    buffer = gl.shared_memory_descriptor
    reinterpret = buffer.reinterpret if hasattr(buffer, "reinterpret") else buffer._reinterpret
    tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    group_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

    @gluon.jit
    def following(slot, phase, SLOTS: gl.constexpr):
        """Return the next buffer of a ring and the parity of its barrier, which flips with every round."""
        around = slot == SLOTS - 1
        return gl.where(around, 0, slot + 1), gl.where(around, phase ^ 1, phase)

    @gluon.jit
    def previous(slot, SLOTS: gl.constexpr):
        """Return the buffer before ``slot`` in a ring."""
        return gl.where(slot == 0, SLOTS - 1, slot - 1)

    @gluon.jit
    def first_row(table, batch, table_batch, capacity, token, wanted, PAGE: gl.constexpr):
        """Return the row of ``token`` of a sequence in the matrix with the rows of all sequences or pages."""
        row = batch * capacity + token
        if PAGE:
            row = gl.load(table + batch * table_batch + token // PAGE, mask=wanted, other=0) * PAGE + token % PAGE
        return row

    @gluon.jit
    def fetch(
        kv, pe, kv_s, pe_s, full, slot, table, batch, table_batch, capacity, pe_capacity, tile, last,
        TOKENS: gl.constexpr, PAGE: gl.constexpr,
    ):  # fmt: skip
        """Start to load tile ``tile``, if it is before ``last``; the barrier ``full`` completes on its arrival."""
        wanted = tile < last
        token = tile * TOKENS
        row = first_row(table, batch, table_batch, capacity, token, wanted, PAGE)
        pe_row = row if PAGE else batch * pe_capacity + token
        bar = full.index(slot)
        mbarrier.expect(bar, kv.block_type.nbytes + pe.block_type.nbytes, wanted)
        tma_load(kv, [row, 0], bar, kv_s.index(slot), wanted)
        tma_load(pe, [pe_row, 0], bar, pe_s.index(slot), wanted)

    @gluon.jit
    def stage(source, rows_at, held, columns, LIMIT: gl.constexpr):
        """Load the ``held`` rows of the queries, up to column LIMIT; zeros elsewhere."""
        inside = held & (columns < LIMIT)[None, :]
        return gl.load(source + rows_at[:, None] * LIMIT + columns[None, :], mask=inside, other=0.0)

    @gluon.jit
    def clear(values, at, length, HALF: gl.constexpr, TOKENS: gl.constexpr):
        """Zero the rows behind the end of the sequence: they may hold NaN, and zero times NaN is not zero."""
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        CHUNK: gl.constexpr = 64 if HALF > 64 else HALF
        for down in gl.static_range(TOKENS // 16):
            token = at + down * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
            for across in gl.static_range(HALF // CHUNK):
                piece = values.slice(down * 16, 16, dim=0).slice(across * CHUNK, CHUNK, dim=1)
                piece.store(gl.where((token < length)[:, None], piece.load(layout), 0.0))
        fence_async_shared()
        group_barrier()

    @gluon.jit
    def keep_sums(
        out, parts, mixed, total_s, rows, block, batch, unit, RANK: gl.constexpr, RANK_BLOCK: gl.constexpr,
        START: gl.constexpr, LAYOUT: gl.constexpr, DIVIDED: gl.constexpr,
    ):  # fmt: skip
        """Divide the sums ``mixed`` [HEIGHT, HALF] by those of the weights, and store them from column START on."""
        mixed = mixed * (1 / total_s.load(gl.SliceLayout(1, LAYOUT)))[:, None]
        row = block * HEIGHT + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, LAYOUT))
        rank = START + gl.arange(0, mixed.shape[1], layout=gl.SliceLayout(0, LAYOUT))
        whole = 0
        if DIVIDED:
            # A piece without a partial result is a whole sequence.
            whole = gl.where(unit < 0, rows, 0)
            _keep(out + batch.to(gl.int64) * rows * RANK, row, rank, whole, mixed, RANK, RANK_BLOCK)
        _keep(parts + unit.to(gl.int64) * rows * RANK, row, rank, rows - whole, mixed, RANK, RANK_BLOCK)

    @gluon.jit
    def _keep(target, row, rank, rows, mixed, RANK: gl.constexpr, RANK_BLOCK: gl.constexpr):
        """Store the first ``rows`` rows and RANK columns of ``mixed``."""
        held = (row < rows)[:, None]
        if RANK < RANK_BLOCK:
            held = held & (rank < RANK)[None, :]
        gl.store(target + row[:, None] * RANK + rank[None, :], mixed.to(target.dtype.element_ty), mask=held)
