"""Packed rows of a latent cache: kv_c as float8 e4m3 with one scale per token, k_pe in its original dtype.

Rotary keys stay in their dtype because they lose too much in 8 bits. DeepSeek-V3 is served with rows of this kind.
Scales are bfloat16 numbers, stored as float32: kernels that multiply in bfloat16 then apply them without rounding.

One row is one line of bytes, [kv_c | scale | k_pe], with each part aligned to 16 bytes. Every cache operation on rows
(selecting, repeating, cropping) therefore applies to all three parts at once.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from transmla.kernels.custom_op import current_device
from transmla.kernels.pack_rows import pack_into, packs
from transmla.kernels.rows import Rows

FLOAT8 = torch.float8_e4m3fn
# Largest float8 value.
LARGEST = torch.finfo(FLOAT8).max
# A largest latent below this counts as this, so that a scale is a normal number.
LEAST = torch.finfo(torch.float32).tiny * 2**10
# Alignment of each part, in bytes.
ALIGNED = 16


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def row_bytes(rank: int, width: int, dtype: torch.dtype) -> int:
    """Return the bytes of a packed row with r = ``rank`` and d_r = ``width``; ``dtype`` is the dtype of k_pe."""
    return _aligned(rank) + ALIGNED + _aligned(width * dtype.itemsize)


def pack(kv_c: Tensor, k_pe: Tensor) -> Tensor:
    """Pack latents ``kv_c`` [..., r] and rotary keys ``k_pe`` [..., d_r] into rows [..., row_bytes] (uint8).

    Compiled code calls one operator: torch 2.11 does not compile a view of bytes as wider numbers for every stride.
    """
    return _operator(kv_c, k_pe) if torch.compiler.is_compiling() else _pack(kv_c, k_pe)


def _pack(kv_c: Tensor, k_pe: Tensor) -> Tensor:
    rows = _unwritten(kv_c, k_pe).zero_()
    if not rows.numel():
        # torch cannot view an empty part as another dtype.
        return rows
    parts = unpack(rows, kv_c.shape[-1], k_pe.shape[-1], k_pe.dtype)
    if packs(kv_c, k_pe):
        with current_device(kv_c.device):
            pack_into(parts, kv_c, k_pe, LEAST, LARGEST)
        return rows
    scale = kv_c.abs().amax(-1, keepdim=True).float().clamp_min(LEAST) / LARGEST
    # Rounded up to bfloat16, whose bits are the upper half of a float32's. The largest bits of a NaN would wrap around.
    scale = ((scale.view(torch.int32).clamp_max(0x7FFF0000) + 0xFFFF) & -0x10000).view(torch.float32)
    parts.kv_c.copy_(kv_c / scale)
    cast(Tensor, parts.scale).copy_(scale[..., 0])
    parts.k_pe.copy_(k_pe)
    return rows


def _unwritten(kv_c: Tensor, k_pe: Tensor) -> Tensor:
    """Return memory for the packed rows."""
    size = row_bytes(kv_c.shape[-1], k_pe.shape[-1], k_pe.dtype)
    return kv_c.new_empty(*kv_c.shape[:-1], size, dtype=torch.uint8)


_operator = torch.library.custom_op(
    "transmla::pack_rows", _pack, mutates_args=(), schema="(Tensor kv_c, Tensor k_pe) -> Tensor"
)
_operator.register_fake(_unwritten)


def unpack(rows: Tensor, rank: int, width: int, dtype: torch.dtype) -> Rows:
    """Return views of the parts of packed rows.

    Args:
        rows: packed rows [..., row_bytes] (uint8).
        rank: r.
        width: d_r.
        dtype: dtype of the rotary keys.

    Returns:
        Rows with kv_c [..., r] (float8), k_pe [..., d_r] and scale [...] (float32).
    """
    at = _aligned(rank)
    end = at + ALIGNED + width * dtype.itemsize
    scale = rows[..., at : at + 4].view(torch.float32)[..., 0]
    return Rows(rows[..., :rank].view(FLOAT8), rows[..., at + ALIGNED : end].view(dtype), scale)


def widened(rows: Tensor, rank: int, width: int, dtype: torch.dtype, wider: torch.dtype) -> Tensor:
    """Return packed rows whose rotary keys have the dtype ``wider``; the other arguments as for ``unpack``."""
    new = rows.new_zeros(*rows.shape[:-1], row_bytes(rank, width, wider))
    if rows.numel():
        old, parts = unpack(rows, rank, width, dtype), unpack(new, rank, width, wider)
        parts.kv_c.copy_(old.kv_c)
        parts.k_pe.copy_(old.k_pe)
        cast(Tensor, parts.scale).copy_(cast(Tensor, old.scale))
    return new
