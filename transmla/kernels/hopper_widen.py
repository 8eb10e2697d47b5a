"""Tiles of float8 latents in the Hopper kernel: loads, and conversion to the dtype of the queries."""

from __future__ import annotations

from typing import Any

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
except ImportError:  # Triton is missing or older than 3.6
    gluon = None

from transmla.kernels.hopper_tiles import first_row, group_barrier, tma_load

fetch_part: Any = None
hand_on: Any = None
load_scales: Any = None
receive: Any = None
widen: Any = None

if gluon is not None:
    # The bits of a float8 (e4m3) number, moved to the place of a wider format, are the number times a power of two
    # (2^-120 for bfloat16, 2^-8 for float16), subnormal numbers included. Four numbers at a time: two pairs of bytes
    # move to the high bytes of two words; sign bits stay, all others move right. Products undo the power of two and
    # apply the factor of the row: two in bfloat16, where one number for both could exceed the format, and one in
    # float16, where the factor of small latents alone would be a subnormal number, which has few digits.
    _BYTES = "{ .reg .b32 a, b, c, d, k; prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424; "
    _SIGNS = "lop3.b32 a, a, 0x80008000, c, 0xEA; lop3.b32 b, b, 0x80008000, d, 0xEA; "
    TO_BFLOAT16 = gl.constexpr(
        _BYTES + "shr.u32 c, a, 4; shr.u32 d, b, 4; and.b32 c, c, 0x07F007F0; and.b32 d, d, 0x07F007F0; " + _SIGNS +
        "mov.b32 k, 0x7B807B80; mul.rn.bf16x2 a, a, k; mul.rn.bf16x2 b, b, k; "
        "mul.rn.bf16x2 $0, a, $3; mul.rn.bf16x2 $1, b, $4; }"
    )  # fmt: skip
    TO_FLOAT16 = gl.constexpr(
        _BYTES + "shr.u32 c, a, 1; shr.u32 d, b, 1; and.b32 c, c, 0x3F803F80; and.b32 d, d, 0x3F803F80; " + _SIGNS +
        "mul.rn.f16x2 $0, a, $3; mul.rn.f16x2 $1, b, $4; }"
    )  # fmt: skip
    # The power of two that TO_FLOAT16 takes in the factor of the row.
    _FLOAT16_UNIT = gl.constexpr(2.0**8)

    @gluon.jit
    def fetch_part(
        source, ring, arrived, slot, table, batch, table_batch, capacity, tile, last, TOKENS: gl.constexpr,
        PAGE: gl.constexpr,
    ):  # fmt: skip
        """Start to load tile ``tile`` of ``source``, if it is before ``last``."""
        wanted = tile < last
        row = first_row(table, batch, table_batch, capacity, tile * TOKENS, wanted, PAGE)
        bar = arrived.index(slot)
        mbarrier.expect(bar, source.block_type.nbytes, wanted)
        tma_load(source, [row, 0], bar, ring.index(slot), wanted)

    @gluon.jit
    def load_scales(
        kv_scale, table, batch, table_batch, capacity, scale_token, tile, last, length, layout: gl.constexpr,
        TOKENS: gl.constexpr, PAGE: gl.constexpr,
    ):  # fmt: skip
        """Load the scales [TOKENS] of a tile; zeros behind the end of the sequence, where memory may hold NaN."""
        wanted = tile < last
        row = first_row(table, batch, table_batch, capacity, tile * TOKENS, wanted, PAGE)
        lane = gl.arange(0, TOKENS, layout=layout)
        inside = wanted & (tile * TOKENS + lane < length)
        return gl.load(kv_scale + (row + lane).to(gl.int64) * scale_token, mask=inside, other=0.0)

    @gluon.jit
    def widen(raw, wide, factors, FROM: gl.constexpr, TO: gl.constexpr, HALF: gl.constexpr):
        """Write rows FROM to TO of one half of a tile from ``raw`` to ``wide``, times ``factors`` [TOKENS] (shared)."""
        # A thread converts 16 numbers of two rows, 8 apart. Lanes cover 64 columns of 8 rows, in an order that keeps
        # both the loads and the stores free of bank conflicts.
        DOWN: gl.constexpr = 16 if HALF == 256 else 32
        layout: gl.constexpr = gl.DistributedLinearLayout(
            reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
            lane_bases=[[0, 16], [0, 32], [5, 0], [1, 0], [2, 0]],
            warp_bases=[[0, 64], [0, 128]] if HALF == 256 else [[0, 64], [16, 0]],
            block_bases=[],
            shape=[DOWN, HALF],
        )
        for down in gl.static_range(FROM, TO, DOWN):
            numbers = raw.slice(down, DOWN, dim=0).load(layout)
            factor = factors.slice(down, DOWN, dim=0).load(gl.SliceLayout(1, layout))
            if wide.dtype == gl.float16:
                factor = factor * _FLOAT16_UNIT
            factor, _ = gl.broadcast(factor.to(wide.dtype)[:, None], numbers)
            if wide.dtype == gl.bfloat16:
                numbers = gl.inline_asm_elementwise(
                    TO_BFLOAT16, "=r,=r,r,r,r", [numbers, factor], dtype=gl.bfloat16, is_pure=True, pack=4
                )  # fmt: skip
            else:
                numbers = gl.inline_asm_elementwise(
                    TO_FLOAT16, "=r,=r,r,r,r", [numbers, factor], dtype=gl.float16, is_pure=True, pack=4
                )  # fmt: skip
            wide.slice(down, DOWN, dim=0).store(numbers)

    @gluon.jit
    def receive(
        scales, factors, arrived, raw_at, raw_phase, kv_scale, table, batch, table_batch, capacity, scale_token, coming,
        last, length, layout: gl.constexpr, TOKENS: gl.constexpr, PAGE: gl.constexpr,
    ):  # fmt: skip
        """Wait for the raw tile ``coming``, if it is before ``last``, and put its ``scales`` in shared memory.

        Returns:
            The scales of the tile behind it [TOKENS], whose loads take as long as a tile.
        """
        factors.store(scales)
        group_barrier()
        mbarrier.wait(arrived.index(raw_at), raw_phase, pred=coming < last)
        return load_scales(
            kv_scale, table, batch, table_batch, capacity, scale_token, coming + 1, last, length, layout, TOKENS, PAGE
        )  # fmt: skip

    @gluon.jit
    def hand_on(
        kv, raw_s, arrived, taken, wide, raw_at, raw_phase, coming_at, table, batch, table_batch, capacity, coming,
        last, SECOND: gl.constexpr, TOKENS: gl.constexpr, RAWS: gl.constexpr, PAGE: gl.constexpr,
    ):  # fmt: skip
        """Tell the first group that a half of tile ``coming`` is widened, and load another raw tile into its buffer."""
        wanted = coming < last
        if SECOND:
            # All warps must see that the other group has read its half before the buffer is loaded: a warp that looked
            # two rounds later would wait for ever.
            mbarrier.wait(taken.index(raw_at), raw_phase, pred=wanted)
        fence_async_shared()
        group_barrier()
        mbarrier.arrive(wide.index(coming_at), count=1, pred=wanted)
        if SECOND:
            fetch_part(
                kv, raw_s, arrived, raw_at, table, batch, table_batch, capacity, coming + RAWS, last, TOKENS, PAGE
            )  # fmt: skip
        else:
            mbarrier.arrive(taken.index(raw_at), count=1, pred=wanted)
