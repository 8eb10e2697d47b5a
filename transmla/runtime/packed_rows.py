"""Latent rows in 8 bits: kv_c as e4m3 with one scale a token, k_pe as it is (rotary keys do not bear less).

All of a row lies in one line of bytes, [kv_c | scale | k_pe], each part 16-byte aligned, so that whatever a cache does
with rows (selecting, repeating, cutting) it does with all of them. DeepSeek-V3 is served with such rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.kernels.rows import Rows

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
ALIGNED = 16


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def row_bytes(rank: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of a packed row of r + d_r values, ``dtype`` that of k_pe."""
    return _aligned(rank) + ALIGNED + _aligned(width * dtype.itemsize)


def pack(kv_c: Tensor, k_pe: Tensor) -> Tensor:
    """Rows [..., row_bytes] (uint8) of kv_c [..., r] and k_pe [..., d_r]."""
    rank, width = kv_c.shape[-1], k_pe.shape[-1]
    scale = kv_c.abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny * 2**10) / LARGEST
    rows = kv_c.new_zeros(*kv_c.shape[:-1], row_bytes(rank, width, k_pe.dtype), dtype=torch.uint8)
    at = _aligned(rank)
    rows[..., :rank] = (kv_c / scale).to(FLOAT8).view(torch.uint8)
    rows[..., at : at + 4] = scale.view(torch.uint8)
    at += ALIGNED
    rows[..., at : at + width * k_pe.element_size()] = k_pe.contiguous().view(torch.uint8)
    return rows


def unpack(rows: Tensor, rank: int, width: int, dtype: torch.dtype) -> Rows:
    """The parts of rows [B, T, row_bytes], as views; ``dtype`` that of k_pe."""
    at = _aligned(rank)
    end = at + ALIGNED + width * dtype.itemsize
    scale = rows[..., at : at + 4].view(torch.float32)[..., 0]
    return Rows(rows[..., :rank].view(FLOAT8), rows[..., at + ALIGNED : end].view(dtype), scale)
