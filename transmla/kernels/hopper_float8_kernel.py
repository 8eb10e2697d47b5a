"""Split-KV flash decoding over float8 latents for Hopper GPUs, in Gluon.

The division of work is that of ``hopper_kernel``. Besides, the two groups that add up values widen latents from float8
to the dtype of the queries: raw tiles arrive in one ring of buffers, wide tiles lie in another, and rotary keys arrive
in a third. The groups widen most of a tile while the first group computes scores and softmax weights, and the rest
while the tensor cores add up values.

Barriers: ``staged`` (the queries are in registers), ``arrived`` (a raw tile), ``arrived_pe`` (its rotary keys),
``wide`` (both halves of its columns are widened), ``taken`` (the first half of a raw tile was read), ``ready`` (the
values of a tile may start), ``empty`` (the first half of the rank is added up), ``done`` (the sums of all weights are
written).
"""

from __future__ import annotations

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
except ImportError:  # Triton is missing or older than 3.6
    gluon = None

from transmla.kernels.hopper_mask import assignment
from transmla.kernels.hopper_tiles import HEIGHT, following, group_barrier, keep_sums, previous, reinterpret
from transmla.kernels.hopper_weights import hide, multiply, soften, stage_queries, store_lse
from transmla.kernels.hopper_widen import fetch_part, hand_on, load_scales, receive, widen

if gluon is not None:

    @gluon.jit
    def _weigh(
        q_latent, q_pe, mask, lse, part_lse, wide_s, pe_s, queries_s, q_pe_s, q_rest_s, weights_s, shrink_s,
        leaps_s, total_s, staged, wide, arrived_pe, ready, done, scale, rows, heads, block, batch, unit, mask_batch,
        mask_query, mask_token, length, low, high, first, last, NEW: gl.constexpr, RANK: gl.constexpr,
        WIDTH: gl.constexpr, RANK_BLOCK: gl.constexpr, TOKENS: gl.constexpr, WIDES: gl.constexpr, STAGES: gl.constexpr,
        SPILL: gl.constexpr, MASKED: gl.constexpr, RAGGED: gl.constexpr, DIVIDED: gl.constexpr, LOG: gl.constexpr,
    ):  # fmt: skip
        """First warp group: compute the weights [HEIGHT, TOKENS] of every tile and the log-sum-exp [HEIGHT]."""
        scores_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
        # The last wide buffer stages the queries on their way to registers, before its first tile is widened.
        queries = stage_queries(
            q_latent, q_pe, queries_s.index(WIDES * TOKENS // HEIGHT - 1), q_pe_s, q_rest_s, rows, block, batch, RANK,
            WIDTH, RANK_BLOCK, SPILL, gl.DotOperandLayout(0, scores_l, 2),
        )  # fmt: skip
        mbarrier.arrive(staged.index(0), count=1)

        row = block * HEIGHT + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, scores_l))
        best = gl.full([HEIGHT], -1e30, gl.float32, layout=gl.SliceLayout(1, scores_l))
        total = gl.zeros([HEIGHT], gl.float32, layout=gl.SliceLayout(1, scores_l))
        # With three wide buffers, scores and values take turns on the tensor cores: the values of a tile start when the
        # scores of the next tile are complete. Two buffers cannot hold the next tile then.
        TURNS: gl.constexpr = WIDES > 2
        wide_at, wide_phase, slot, phase = 0, 0, 0, 0
        for tile in range(first, last):
            mbarrier.wait(wide.index(wide_at), wide_phase)
            scores = gl.zeros([HEIGHT, TOKENS], gl.float32, layout=scores_l)
            scores = multiply(queries, q_rest_s, wide_s.index(wide_at), scores, RANK_BLOCK, SPILL)
            mbarrier.wait(arrived_pe.index(slot), phase)
            scores = warpgroup_mma(q_pe_s, pe_s.index(slot).permute((1, 0)), scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            # All warps must be done with the rotary keys before the weights overwrite them.
            group_barrier()
            if TURNS:
                mbarrier.arrive(ready.index(previous(slot, STAGES)), count=1, pred=tile > first)
            if (tile * TOKENS < low) | (tile * TOKENS + TOKENS > high):
                scores = hide(
                    scores, mask, row, tile, batch, length, rows, heads, mask_batch, mask_query, mask_token, NEW,
                    TOKENS, MASKED, RAGGED, scores_l,
                )  # fmt: skip
            best, total = soften(
                scores, best, total, scale, shrink_s.index(slot), leaps_s.index(slot), weights_s.index(slot)
            )  # fmt: skip
            if not TURNS:
                group_barrier()
                mbarrier.arrive(ready.index(slot), count=1)
            slot, phase = following(slot, phase, STAGES)
            wide_at, wide_phase = following(wide_at, wide_phase, WIDES)
        some = total > 0
        total = gl.where(some, total, 1.0)
        total_s.store(total)
        group_barrier()
        if TURNS:
            mbarrier.arrive(ready.index(previous(slot, STAGES)), count=1, pred=last > first)
        mbarrier.arrive(done.index(0), count=1)
        store_lse(lse, part_lse, best, total, some, row, rows, batch, unit, DIVIDED, LOG)

    @gluon.jit
    def _add_up(
        kv, pe, kv_scale, table, out, parts, raw_s, wide_s, pe_s, weights_s, shrink_s, leaps_s, factors_s, total_s,
        staged, arrived, arrived_pe, wide, taken, ready, empty, done, rows, block, batch, unit, capacity, pe_capacity,
        scale_token, table_batch, length, first, last, SECOND: gl.constexpr, RANK: gl.constexpr,
        RANK_BLOCK: gl.constexpr, TOKENS: gl.constexpr, RAWS: gl.constexpr, WIDES: gl.constexpr,
        STAGES: gl.constexpr, PAGE: gl.constexpr, DIVIDED: gl.constexpr,
    ):  # fmt: skip
        """Second and third warp group: widen latents, and add up weights times values [HEIGHT, HALF].

        Each group does both for one half of the rank. The group of the second half (``SECOND``) also starts the loads.
        """
        HALF: gl.constexpr = RANK_BLOCK // 2
        START: gl.constexpr = HALF if SECOND else 0
        AHEAD: gl.constexpr = WIDES - 1
        # Rows of a tile that are widened before the values of an earlier tile start. More, and the values start late;
        # fewer, and the scores of the tile do.
        FRONT: gl.constexpr = 48 if HALF == 256 else 32
        values_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
        lane_l: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        if SECOND:
            for slot in gl.static_range(RAWS):
                fetch_part(
                    kv, raw_s, arrived, slot, table, batch, table_batch, capacity, first + slot, last, TOKENS, PAGE
                )  # fmt: skip
            for slot in gl.static_range(STAGES):
                fetch_part(
                    pe, pe_s, arrived_pe, slot, table, batch, table_batch, pe_capacity, first + slot, last, TOKENS, PAGE
                )  # fmt: skip
        mixed = gl.zeros([HEIGHT, HALF], gl.float32, layout=values_l)
        factors = factors_s.index(1 if SECOND else 0)
        scales = load_scales(
            kv_scale, table, batch, table_batch, capacity, scale_token, first, last, length, lane_l, TOKENS, PAGE
        )  # fmt: skip
        # ``raw_at`` and ``coming_at`` are the buffers of the tile that is widened, AHEAD of the tile that is added up.
        raw_at, raw_phase, coming_at, wide_at, slot, phase = 0, 0, 0, 0, 0, 0
        for ahead in gl.static_range(AHEAD):
            coming = first + ahead
            scales = receive(
                scales, factors, arrived, raw_at, raw_phase, kv_scale, table, batch, table_batch, capacity,
                scale_token, coming, last, length, lane_l, TOKENS, PAGE,
            )  # fmt: skip
            raw = raw_s.index(raw_at).slice(START, HALF, dim=1)
            widen(raw, wide_s.index(coming_at).slice(START, HALF, dim=1), factors, 0, TOKENS, HALF)
            hand_on(
                kv, raw_s, arrived, taken, wide, raw_at, raw_phase, coming_at, table, batch, table_batch, capacity,
                coming, last, SECOND, TOKENS, RAWS, PAGE,
            )  # fmt: skip
            raw_at, raw_phase = following(raw_at, raw_phase, RAWS)
            coming_at, _ = following(coming_at, 0, WIDES)
        # The last wide buffer staged the queries.
        mbarrier.wait(staged.index(0), 0)
        for tile in range(first, last):
            # Behind the last tile, an old tile is widened again and is not used: without a branch, products continue.
            coming = tile + AHEAD
            scales = receive(
                scales, factors, arrived, raw_at, raw_phase, kv_scale, table, batch, table_batch, capacity,
                scale_token, coming, last, length, lane_l, TOKENS, PAGE,
            )  # fmt: skip
            raw = raw_s.index(raw_at).slice(START, HALF, dim=1)
            widened = wide_s.index(coming_at).slice(START, HALF, dim=1)
            widen(raw, widened, factors, 0, FRONT, HALF)
            mbarrier.wait(ready.index(slot), phase)
            values = wide_s.index(wide_at).slice(START, HALF, dim=1)
            if gl.max(leaps_s.index(slot).load(gl.BlockedLayout([4], [32], [4], [0])), 0) > 0:
                mixed = mixed * shrink_s.index(slot).load(gl.SliceLayout(1, values_l)).to(gl.float32)[:, None]
            mixed = warpgroup_mma(weights_s.index(slot), values, mixed, is_async=True)
            widen(raw, widened, factors, FRONT, TOKENS, HALF)
            hand_on(
                kv, raw_s, arrived, taken, wide, raw_at, raw_phase, coming_at, table, batch, table_batch, capacity,
                coming, last, SECOND, TOKENS, RAWS, PAGE,
            )  # fmt: skip
            mixed = warpgroup_mma_wait(0, deps=[mixed])
            if SECOND:
                # Once both groups are done with the weights of the tile, its buffer can take other rotary keys.
                mbarrier.wait(empty.index(slot), phase)
            group_barrier()
            if SECOND:
                fetch_part(
                    pe, pe_s, arrived_pe, slot, table, batch, table_batch, pe_capacity, tile + STAGES, last, TOKENS,
                    PAGE,
                )  # fmt: skip
            else:
                mbarrier.arrive(empty.index(slot), count=1)
            raw_at, raw_phase = following(raw_at, raw_phase, RAWS)
            slot, phase = following(slot, phase, STAGES)
            wide_at, _ = following(wide_at, 0, WIDES)
            coming_at, _ = following(coming_at, 0, WIDES)
        mbarrier.wait(done.index(0), 0)
        keep_sums(
            out, parts, mixed, total_s, rows, block, batch, unit, RANK, RANK_BLOCK, START, values_l, DIVIDED
        )  # fmt: skip

    # These arguments change while a cache grows, and must not trigger recompilation.
    @gluon.jit(do_not_specialize=["total", "splits", "capacity", "pe_capacity"])
    def attend(
        q_latent, q_pe, kv, pe, kv_scale, mask, lengths, table, slots, bounds, out, lse, parts, part_lse, scale, heads,
        rows, total, splits, capacity, pe_capacity, scale_token, lengths_batch, mask_batch, mask_query, mask_token,
        table_batch, NEW: gl.constexpr, RANK: gl.constexpr, WIDTH: gl.constexpr, RANK_BLOCK: gl.constexpr,
        TOKENS: gl.constexpr, RAWS: gl.constexpr, WIDES: gl.constexpr, STAGES: gl.constexpr, SPILL: gl.constexpr,
        PAGE: gl.constexpr, MASKED: gl.constexpr, RAGGED: gl.constexpr, DIVIDED: gl.constexpr, LOG: gl.constexpr,
        REGISTERS: gl.constexpr,
    ):  # fmt: skip
        """Attend with one block of query rows (token, head) of one sequence to one piece of its cache.

        Arguments as in ``hopper_kernel.attend``. ``kv`` describes bytes, ``kv_scale`` is float32, with ``scale_token``
        numbers from row to row. RAWS, WIDES and STAGES are the buffers of raw tiles, wide tiles and rotary keys.
        """
        block = gl.program_id(0)
        batch, unit, rows, length, first, last, low, high = assignment(
            mask, lengths, slots, bounds, rows, total, splits, lengths_batch, mask_batch, mask_query, mask_token, NEW,
            TOKENS, MASKED, RAGGED, DIVIDED,
        )  # fmt: skip

        dtype: gl.constexpr = pe.dtype
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        arrived = gl.allocate_shared_memory(gl.int64, [RAWS, 1], mbarrier.MBarrierLayout())
        staged = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [RAWS, 1], mbarrier.MBarrierLayout())
        wide = gl.allocate_shared_memory(gl.int64, [WIDES, 1], mbarrier.MBarrierLayout())
        arrived_pe = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        done = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(RAWS):
            mbarrier.init(arrived.index(slot), count=1)
            mbarrier.init(taken.index(slot), count=1)
        for slot in gl.static_range(WIDES):
            mbarrier.init(wide.index(slot), count=2)
        for slot in gl.static_range(STAGES):
            mbarrier.init(arrived_pe.index(slot), count=1)
            mbarrier.init(ready.index(slot), count=1)
            mbarrier.init(empty.index(slot), count=1)
        mbarrier.init(staged.index(0), count=1)
        mbarrier.init(done.index(0), count=1)
        raw_s = gl.allocate_shared_memory(kv.dtype, [RAWS, TOKENS, RANK_BLOCK], kv.layout)
        wide_s = gl.allocate_shared_memory(dtype, [WIDES, TOKENS, RANK_BLOCK], pe.layout)
        pe_s = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, 64], pe.layout)
        queries_s = reinterpret(wide_s, dtype, [WIDES * TOKENS // HEIGHT, HEIGHT, RANK_BLOCK], pe.layout)
        # The weights of a tile overwrite its rotary keys, which are no longer needed.
        weights_l: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEIGHT, TOKENS], dtype)
        weights_s = reinterpret(pe_s, dtype, [STAGES, HEIGHT, TOKENS], weights_l)
        q_pe_s = gl.allocate_shared_memory(dtype, [HEIGHT, 64], pe.layout)
        rest_l: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
        q_rest_s = gl.allocate_shared_memory(dtype, [HEIGHT if SPILL else 8, 16], rest_l)
        shrink_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, HEIGHT], flat)
        leaps_s = gl.allocate_shared_memory(gl.float32, [STAGES, 4], flat)
        factors_s = gl.allocate_shared_memory(gl.float32, [2, TOKENS], flat)
        # The sums of the weights overwrite the rotary queries after the last tile.
        total_s = reinterpret(q_pe_s, gl.float32, [32, HEIGHT], flat).index(0)
        # fmt: off
        gl.warp_specialize(
            [
                (_weigh, (
                    q_latent, q_pe, mask, lse, part_lse, wide_s, pe_s, queries_s, q_pe_s, q_rest_s, weights_s,
                    shrink_s, leaps_s, total_s, staged, wide, arrived_pe, ready, done, scale, rows, heads, block,
                    batch, unit, mask_batch, mask_query, mask_token, length, low, high, first, last, NEW, RANK, WIDTH,
                    RANK_BLOCK, TOKENS, WIDES, STAGES, SPILL, MASKED, RAGGED, DIVIDED, LOG,
                )),
                (_add_up, (
                    kv, pe, kv_scale, table, out, parts, raw_s, wide_s, pe_s, weights_s, shrink_s, leaps_s, factors_s,
                    total_s, staged, arrived, arrived_pe, wide, taken, ready, empty, done, rows, block, batch, unit,
                    capacity, pe_capacity, scale_token, table_batch, length, first, last, False, RANK, RANK_BLOCK,
                    TOKENS, RAWS, WIDES, STAGES, PAGE, DIVIDED,
                )),
                (_add_up, (
                    kv, pe, kv_scale, table, out, parts, raw_s, wide_s, pe_s, weights_s, shrink_s, leaps_s, factors_s,
                    total_s, staged, arrived, arrived_pe, wide, taken, ready, empty, done, rows, block, batch, unit,
                    capacity, pe_capacity, scale_token, table_batch, length, first, last, True, RANK, RANK_BLOCK,
                    TOKENS, RAWS, WIDES, STAGES, PAGE, DIVIDED,
                )),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )
        # fmt: on
