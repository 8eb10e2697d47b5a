"""Scores and softmax weights of a cache tile in the Hopper kernels, for the query rows of one program."""

from __future__ import annotations

from typing import Any

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma
except ImportError:  # Triton is missing or older than 3.6
    gluon = None

from transmla.kernels.hopper_tiles import HEIGHT, group_barrier, stage

hide: Any = None
multiply: Any = None
soften: Any = None
stage_queries: Any = None
store_lse: Any = None

if gluon is not None:

    @gluon.jit
    def stage_queries(
        q_latent, q_pe, stage_s, q_pe_s, q_rest_s, rows, block, batch, RANK: gl.constexpr, WIDTH: gl.constexpr,
        RANK_BLOCK: gl.constexpr, SPILL: gl.constexpr, LAYOUT: gl.constexpr,
    ):  # fmt: skip
        """Return the latent queries of a block of rows as operands, by way of ``stage_s`` [HEIGHT, RANK_BLOCK].

        The rotary queries go to ``q_pe_s``. With ``SPILL``, for 512 columns and tiles of 64 tokens, the last 16 columns
        of the latent queries stay in shared memory, in ``q_rest_s``: registers hold 496 columns beside the scores.
        """
        wide_l: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        row = block * HEIGHT + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, wide_l))
        held = (row < rows)[:, None]
        rows_at = batch.to(gl.int64) * rows + row
        rank = gl.arange(0, RANK_BLOCK, layout=gl.SliceLayout(0, wide_l))
        width = gl.arange(0, 64, layout=gl.SliceLayout(0, wide_l))
        stage_s.store(stage(q_latent, rows_at, held, rank, RANK))
        q_pe_s.store(stage(q_pe, rows_at, held, width, WIDTH))
        if SPILL:
            rest = 496 + gl.arange(0, 16, layout=gl.SliceLayout(0, wide_l))
            q_rest_s.store(stage(q_latent, rows_at, held, rest, RANK))
        group_barrier()
        # Tensors have powers of two of columns.
        queries = (stage_s.slice(0, 256 if SPILL else RANK_BLOCK, dim=1).load(LAYOUT),)
        if SPILL:
            queries += stage_s.slice(256, 128, dim=1).load(LAYOUT), stage_s.slice(384, 64, dim=1).load(LAYOUT)  # type: ignore[assignment]
            queries += stage_s.slice(448, 32, dim=1).load(LAYOUT), stage_s.slice(480, 16, dim=1).load(LAYOUT)  # type: ignore[assignment]
        fence_async_shared()
        group_barrier()
        return queries

    @gluon.jit
    def multiply(queries, q_rest_s, keys, scores, RANK_BLOCK: gl.constexpr, SPILL: gl.constexpr):
        """Start to multiply the latent ``queries`` of ``stage_queries`` with ``keys`` [TOKENS, RANK_BLOCK]."""
        if SPILL:
            scores = _score(queries[0], keys, 0, 256, scores, False)
            scores = _score(queries[1], keys, 256, 128, scores, True)
            scores = _score(queries[2], keys, 384, 64, scores, True)
            scores = _score(queries[3], keys, 448, 32, scores, True)
            scores = _score(queries[4], keys, 480, 16, scores, True)
            scores = _score(q_rest_s, keys, 496, 16, scores, True)
        else:
            scores = _score(queries[0], keys, 0, RANK_BLOCK, scores, False)
        return scores

    @gluon.jit
    def _score(queries, keys, START: gl.constexpr, COLUMNS: gl.constexpr, scores, ADD: gl.constexpr):
        """Start to multiply ``queries`` with some columns of ``keys`` [TOKENS, ...], and to ADD to the ``scores``."""
        keys = keys.slice(START, COLUMNS, dim=1).permute((1, 0))
        return warpgroup_mma(queries, keys, scores, use_acc=ADD, is_async=True)

    @gluon.jit
    def hide(
        scores, mask, row, tile, batch, length, rows, heads, mask_batch, mask_query, mask_token, NEW: gl.constexpr,
        TOKENS: gl.constexpr, MASKED: gl.constexpr, RAGGED: gl.constexpr, LAYOUT: gl.constexpr,
    ):  # fmt: skip
        """Set the ``scores`` of a tile's keys that a query does not attend to, to minus infinity."""
        key = tile * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, LAYOUT))
        # With lengths, a new token attends to the rows up to itself. Without lengths, the mask alone decides.
        end = length - NEW + 1 + row // heads if RAGGED else length + row * 0
        seen = key[None, :] < end[:, None]
        if MASKED:
            at = (row // heads * mask_query)[:, None] + (key.to(gl.int64) * mask_token)[None, :]
            inside = (row < rows)[:, None] & (key < length)[None, :]
            shown = gl.load(mask + batch.to(gl.int64) * mask_batch + at, mask=inside, other=0) != 0
            seen = seen & shown if RAGGED else shown
        return gl.where(seen, scores, float("-inf"))

    @gluon.jit
    def soften(scores, best, total, scale, shrink_s, leaps_s, weights_s):
        """Store the softmax weights of a tile, and by how much they shrink the sums of earlier tiles.

        Returns:
            The reference maximum of each row, and the sum of its weights.
        """
        # The reference maximum is raised only when the scores exceed it by 8 (base 2: a factor of 256). Most tiles
        # therefore need no rescaling of the sums. As it is an integer, bfloat16 holds the factor exactly.
        higher = gl.max(scores, 1) * scale
        higher = gl.where(higher > best + 8, higher.to(gl.int32).to(gl.float32) + 1, best)
        shrink = gl.exp2(best - higher)
        shrink_s.store(shrink.to(gl.bfloat16))
        leaps_s.store(gl.max((higher - best).reshape([4, HEIGHT // 4]), 1))
        weights = gl.exp2(scores * scale - higher[:, None])
        total = total * shrink + gl.sum(weights, 1)
        weights_s.store(weights.to(weights_s.dtype))
        fence_async_shared()
        return higher, total

    @gluon.jit
    def store_lse(
        lse, part_lse, best, total, some, row, rows, batch, unit, DIVIDED: gl.constexpr, LOG: gl.constexpr
    ):  # fmt: skip
        """Store the log-sum-exp of each row: minus infinity unless it attends to ``some`` key."""
        found = gl.where(some, best + gl.log2(total), float("-inf"))
        if DIVIDED and unit < 0:
            gl.store(lse + batch * rows + row, found * LOG, mask=row < rows)
        else:
            gl.store(part_lse + unit * rows + row, found * (1.0 if DIVIDED else LOG), mask=row < rows)
