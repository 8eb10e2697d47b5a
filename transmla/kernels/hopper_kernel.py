"""Split-KV flash decoding for Hopper GPUs, in Gluon, the low level of Triton.

One program serves 64 query rows with three groups of four warps. The first group keeps the queries in registers and
computes the softmax weights of each cache tile. The other two groups add up the weighted values, each for one half of
the rank. The tensor memory accelerator (TMA) loads tiles into a ring of buffers, where a row serves as key and as
value. Three steps therefore run at the same time: the softmax of one tile, the values of the previous tile, and the
loads of the next tiles. This is warp specialisation as in FlashAttention-3 (arXiv 2407.08608), with another division
of work.

Scores and values take turns on the tensor cores: the values of a tile start when the scores of the next tile are
complete, so that they run during its softmax. If both ran at once, the tensor cores would idle during the softmax.

Barriers of a buffer: ``full`` (the tile has arrived), ``ready`` (its values may start), ``empty`` (the first half of
the rank is added up). ``done``: the sums of all weights are written.
"""

from __future__ import annotations

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
except ImportError:  # Triton is missing or older than 3.6
    gluon = None

from transmla.kernels.hopper_mask import assignment
from transmla.kernels.hopper_tiles import (
    HEIGHT,
    clear,
    fetch,
    following,
    group_barrier,
    keep_sums,
    previous,
    reinterpret,
)
from transmla.kernels.hopper_weights import hide, multiply, soften, stage_queries, store_lse

if gluon is not None:

    @gluon.jit
    def _weigh(
        q_latent, q_pe, kv, pe, table, mask, lse, part_lse, kv_s, pe_s, queries_s, q_pe_s, q_rest_s, weights_s,
        shrink_s, leaps_s, total_s, full, ready, done, scale, rows, heads, block, batch, unit, capacity, pe_capacity,
        table_batch, mask_batch, mask_query, mask_token, length, low, high, first, last, NEW: gl.constexpr,
        RANK: gl.constexpr, WIDTH: gl.constexpr, RANK_BLOCK: gl.constexpr, TOKENS: gl.constexpr,
        STAGES: gl.constexpr, LATE: gl.constexpr, SPILL: gl.constexpr, PAGE: gl.constexpr, MASKED: gl.constexpr,
        RAGGED: gl.constexpr, DIVIDED: gl.constexpr, LOG: gl.constexpr,
    ):  # fmt: skip
        """First warp group: compute the weights [HEIGHT, TOKENS] of every tile and the log-sum-exp [HEIGHT]."""
        scores_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
        # The last LATE buffers stage the queries on their way to registers. The tiles of these buffers are therefore
        # loaded below, after the queries.
        queries = stage_queries(
            q_latent, q_pe, queries_s.index(STAGES * TOKENS // HEIGHT - 1), q_pe_s, q_rest_s, rows, block, batch, RANK,
            WIDTH, RANK_BLOCK, SPILL, gl.DotOperandLayout(0, scores_l, 2),
        )  # fmt: skip
        for slot in gl.static_range(STAGES - LATE, STAGES):
            fetch(
                kv, pe, kv_s, pe_s, full, slot, table, batch, table_batch, capacity, pe_capacity, first + slot, last,
                TOKENS, PAGE,
            )  # fmt: skip

        row = block * HEIGHT + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, scores_l))
        best = gl.full([HEIGHT], -1e30, gl.float32, layout=gl.SliceLayout(1, scores_l))
        total = gl.zeros([HEIGHT], gl.float32, layout=gl.SliceLayout(1, scores_l))
        slot, phase = 0, 0
        for tile in range(first, last):
            mbarrier.wait(full.index(slot), phase)
            scores = gl.zeros([HEIGHT, TOKENS], gl.float32, layout=scores_l)
            scores = multiply(queries, q_rest_s, kv_s.index(slot), scores, RANK_BLOCK, SPILL)
            scores = warpgroup_mma(q_pe_s, pe_s.index(slot).permute((1, 0)), scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            # All warps must be done with the rotary keys before the weights overwrite them, and with the weights of the
            # previous tile before its values start.
            group_barrier()
            mbarrier.arrive(ready.index(previous(slot, STAGES)), count=1, pred=tile > first)
            if (tile * TOKENS < low) | (tile * TOKENS + TOKENS > high):
                scores = hide(
                    scores, mask, row, tile, batch, length, rows, heads, mask_batch, mask_query, mask_token, NEW,
                    TOKENS, MASKED, RAGGED, scores_l,
                )  # fmt: skip
            best, total = soften(
                scores, best, total, scale, shrink_s.index(slot), leaps_s.index(slot), weights_s.index(slot)
            )  # fmt: skip
            slot, phase = following(slot, phase, STAGES)
        some = total > 0
        total = gl.where(some, total, 1.0)
        total_s.store(total)
        group_barrier()
        mbarrier.arrive(ready.index(previous(slot, STAGES)), count=1, pred=last > first)
        mbarrier.arrive(done.index(0), count=1)
        store_lse(lse, part_lse, best, total, some, row, rows, batch, unit, DIVIDED, LOG)

    @gluon.jit
    def _add_up(
        kv, pe, table, out, parts, kv_s, pe_s, weights_s, shrink_s, leaps_s, total_s, full, ready, empty, done, rows,
        block, batch, unit, capacity, pe_capacity, table_batch, length, first, last, SECOND: gl.constexpr,
        RANK: gl.constexpr, RANK_BLOCK: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
        LATE: gl.constexpr, PAGE: gl.constexpr, DIVIDED: gl.constexpr,
    ):  # fmt: skip
        """Second and third warp group: add up weights times values [HEIGHT, HALF] for one half of the rank.

        The group of the second half (``SECOND``) also starts the loads of the tiles.
        """
        HALF: gl.constexpr = RANK_BLOCK // 2
        START: gl.constexpr = HALF if SECOND else 0
        values_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
        if SECOND:
            for slot in gl.static_range(STAGES - LATE):
                fetch(
                    kv, pe, kv_s, pe_s, full, slot, table, batch, table_batch, capacity, pe_capacity, first + slot,
                    last, TOKENS, PAGE,
                )  # fmt: skip
        mixed = gl.zeros([HEIGHT, HALF], gl.float32, layout=values_l)
        slot, phase = 0, 0
        for tile in range(first, last):
            mbarrier.wait(ready.index(slot), phase)
            values = kv_s.index(slot).slice(START, HALF, dim=1)
            if gl.max(leaps_s.index(slot).load(gl.BlockedLayout([4], [32], [4], [0])), 0) > 0:
                mixed = mixed * shrink_s.index(slot).load(gl.SliceLayout(1, values_l)).to(gl.float32)[:, None]
            if tile * TOKENS + TOKENS > length:
                clear(values, tile * TOKENS, length, HALF, TOKENS)
            mixed = warpgroup_mma(weights_s.index(slot), values, mixed, is_async=True)
            mixed = warpgroup_mma_wait(0, deps=[mixed])
            if SECOND:
                # Once both groups are done with the tile, its buffer can take another tile. All warps must see that
                # before the buffer is loaded: a warp that looked two rounds later would wait for ever.
                mbarrier.wait(empty.index(slot), phase)
            group_barrier()
            if SECOND:
                fetch(
                    kv, pe, kv_s, pe_s, full, slot, table, batch, table_batch, capacity, pe_capacity, tile + STAGES,
                    last, TOKENS, PAGE,
                )  # fmt: skip
            else:
                mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = following(slot, phase, STAGES)
        mbarrier.wait(done.index(0), 0)
        keep_sums(
            out, parts, mixed, total_s, rows, block, batch, unit, RANK, RANK_BLOCK, START, values_l, DIVIDED
        )  # fmt: skip

    # These arguments change while a cache grows, and must not trigger recompilation.
    @gluon.jit(do_not_specialize=["total", "splits", "capacity", "pe_capacity"])
    def attend(
        q_latent, q_pe, kv, pe, mask, lengths, table, slots, bounds, out, lse, parts, part_lse, scale, heads, rows,
        total, splits, capacity, pe_capacity, lengths_batch, mask_batch, mask_query, mask_token, table_batch,
        NEW: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr, RANK_BLOCK: gl.constexpr, TOKENS: gl.constexpr,
        STAGES: gl.constexpr, SPILL: gl.constexpr, PAGE: gl.constexpr, MASKED: gl.constexpr, RAGGED: gl.constexpr,
        DIVIDED: gl.constexpr, LOG: gl.constexpr, REGISTERS: gl.constexpr,
    ):  # fmt: skip
        """Attend with one block of query rows (token, head) of one sequence to one piece of its cache.

        The pieces are equal splits, or those of a division (``DIVIDED``).
        """
        block = gl.program_id(0)
        batch, unit, rows, length, first, last, low, high = assignment(
            mask, lengths, slots, bounds, rows, total, splits, lengths_batch, mask_batch, mask_query, mask_token, NEW,
            TOKENS, MASKED, RAGGED, DIVIDED,
        )  # fmt: skip

        dtype: gl.constexpr = kv.dtype
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        done = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(STAGES):
            mbarrier.init(full.index(slot), count=1)
            mbarrier.init(ready.index(slot), count=1)
            mbarrier.init(empty.index(slot), count=1)
        mbarrier.init(done.index(0), count=1)
        kv_s = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, RANK_BLOCK], kv.layout)
        pe_s = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, 64], pe.layout)
        # The queries are staged in the last LATE buffers before the tiles of these buffers are loaded.
        LATE: gl.constexpr = (HEIGHT + TOKENS - 1) // TOKENS
        queries_s = reinterpret(kv_s, dtype, [STAGES * TOKENS // HEIGHT, HEIGHT, RANK_BLOCK], kv.layout)
        # The weights of a tile overwrite its rotary keys, which are no longer needed.
        weights_l: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEIGHT, TOKENS], dtype)
        weights_s = reinterpret(pe_s, dtype, [STAGES, HEIGHT, TOKENS], weights_l)
        q_pe_s = gl.allocate_shared_memory(dtype, [HEIGHT, 64], pe.layout)
        rest_l: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
        q_rest_s = gl.allocate_shared_memory(dtype, [HEIGHT if SPILL else 8, 16], rest_l)
        shrink_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, HEIGHT], flat)
        leaps_s = gl.allocate_shared_memory(gl.float32, [STAGES, 4], flat)
        # The sums of the weights overwrite the rotary queries after the last tile.
        total_s = reinterpret(q_pe_s, gl.float32, [32, HEIGHT], flat).index(0)
        # fmt: off
        gl.warp_specialize(
            [
                (_weigh, (
                    q_latent, q_pe, kv, pe, table, mask, lse, part_lse, kv_s, pe_s, queries_s, q_pe_s, q_rest_s,
                    weights_s, shrink_s, leaps_s, total_s, full, ready, done, scale, rows, heads, block, batch, unit,
                    capacity, pe_capacity, table_batch, mask_batch, mask_query, mask_token, length, low, high, first,
                    last, NEW, RANK, WIDTH, RANK_BLOCK, TOKENS, STAGES, LATE, SPILL, PAGE, MASKED, RAGGED, DIVIDED,
                    LOG,
                )),
                (_add_up, (
                    kv, pe, table, out, parts, kv_s, pe_s, weights_s, shrink_s, leaps_s, total_s, full, ready, empty,
                    done, rows, block, batch, unit, capacity, pe_capacity, table_batch, length, first, last, False,
                    RANK, RANK_BLOCK, TOKENS, STAGES, LATE, PAGE, DIVIDED,
                )),
                (_add_up, (
                    kv, pe, table, out, parts, kv_s, pe_s, weights_s, shrink_s, leaps_s, total_s, full, ready, empty,
                    done, rows, block, batch, unit, capacity, pe_capacity, table_batch, length, first, last, True,
                    RANK, RANK_BLOCK, TOKENS, STAGES, LATE, PAGE, DIVIDED,
                )),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )
        # fmt: on
