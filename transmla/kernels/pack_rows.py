"""Packed rows of a latent cache in one Triton kernel. Eager code launches ten."""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.kernels.rows import Rows

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch has no Triton
    triton = None

# Lowest compute capability whose kernels write float8 numbers (Ada).
FLOAT8_FROM = (8, 9)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

if triton is not None:

    @triton.jit
    def _pack(
        kv_c, k_pe, latents, scales, keys, kv_stride, pe_stride, latents_stride, scales_stride, keys_stride, least,
        largest, RANK: tl.constexpr, WIDTH: tl.constexpr, RANK_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Pack one row."""
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, RANK_BLOCK)
        inside = column < RANK
        values = tl.load(kv_c + row * kv_stride + column, mask=inside, other=0.0).to(tl.float32)
        # A maximum passes over NaN. A row with NaN gets NaN as its scale.
        broken = tl.max((values != values).to(tl.int32), 0) > 0
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values), 0), least), largest)
        # Rounded up to bfloat16, whose bits are the upper half of a float32's.
        scale = ((scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
        scale = tl.where(broken, float("nan"), scale)
        tl.store(scales + row * scales_stride, scale)
        scaled = tl.div_rn(values, tl.broadcast_to(scale, [RANK_BLOCK])).to(latents.dtype.element_ty)
        tl.store(latents + row * latents_stride + column, scaled, mask=inside)
        column = tl.arange(0, WIDTH_BLOCK)
        key = tl.load(k_pe + row * pe_stride + column, mask=column < WIDTH, other=0.0)
        tl.store(keys + row * keys_stride + column, key, mask=column < WIDTH)


def packs(kv_c: Tensor, k_pe: Tensor) -> bool:
    """Whether ``pack_into`` can pack latents ``kv_c`` and rotary keys ``k_pe``: plain tensors on a device for it."""
    if triton is None or kv_c.dtype not in DTYPES or not k_pe.shape[-1]:
        return False
    mapped = torch._C._are_functorch_transforms_active()
    return not mapped and type(kv_c) is Tensor and type(k_pe) is Tensor and on_gpu(kv_c)


def on_gpu(x: Tensor) -> bool:
    """Whether ``x`` lies on a GPU whose kernels write float8 numbers."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= FLOAT8_FROM


def pack_into(parts: Rows, kv_c: Tensor, k_pe: Tensor, least: float, largest: float) -> None:
    """Write rows to ``parts``, views of contiguous packed rows with the same leading shape.

    Args:
        parts: latents in float8, scales in float32, rotary keys in the dtype of ``k_pe``.
        kv_c: latents [..., r].
        k_pe: rotary keys [..., d_r].
        least: the largest magnitude of a latent counts as at least this.
        largest: largest float8 number.
    """
    rank, width = kv_c.shape[-1], k_pe.shape[-1]
    assert parts.scale is not None
    latents, scales, keys = parts.kv_c.view(-1, rank), parts.scale.view(-1), parts.k_pe.view(-1, width)
    kv_c, k_pe = _rows(kv_c), _rows(k_pe)
    block = triton.next_power_of_2(rank)
    _pack[(len(kv_c),)](
        kv_c,
        k_pe,
        latents,
        scales,
        keys,
        kv_c.stride(0),
        k_pe.stride(0),
        latents.stride(0),
        scales.stride(0),
        keys.stride(0),
        least,
        largest,
        RANK=rank,
        WIDTH=width,
        RANK_BLOCK=block,
        WIDTH_BLOCK=triton.next_power_of_2(width),
        num_warps=1,
    )


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
