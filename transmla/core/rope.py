"""Rotary embedding as multiplication of complex numbers.

RoPE pairs the coordinates f and f + d/2 (halves layout) and rotates each pair by the angle θ_f·position (Su et al.,
arXiv 2104.09864). With z_f = x_f + i·x_{f+d/2}, the rotation is a product with e^{iθ_f·position}.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_complex(weight: Tensor) -> Tensor:
    """Convert rows in halves layout to complex rows: [..., 2p, D] → [..., p, D]."""
    real, imag = weight.chunk(2, dim=-2)
    return torch.complex(real.contiguous(), imag.contiguous())


def to_halves(weight: Tensor) -> Tensor:
    """Convert complex rows to rows in halves layout: [..., p, D] → [..., 2p, D]."""
    return torch.cat([weight.real, weight.imag], dim=-2)


def halves_to_interleaved(width: int) -> Tensor:
    """Return the row order [width] from halves layout (0, …, d/2, …) to interleaved pairs (0, d/2, 1, d/2 + 1, …)."""
    return torch.arange(width).view(2, width // 2).T.reshape(-1)


def rotate(x: Tensor, inv_freq: Tensor, positions: Tensor) -> Tensor:
    """Rotate ``x`` [..., T, 2p] in halves layout by the angles ``inv_freq`` [p] · ``positions`` [T], in radians."""
    angle = positions.to(x.dtype)[:, None] * inv_freq.to(x.dtype)
    cos, sin = angle.cos(), angle.sin()
    real, imag = x.chunk(2, dim=-1)
    return torch.cat([real * cos - imag * sin, imag * cos + real * sin], dim=-1)


def match_slots(target: Tensor, source: Tensor, *, tolerance: float = 1e-5) -> tuple[int, ...] | None:
    """Return the index into ``source`` [p] of every frequency in ``target`` [s].

    Returns None if a target frequency differs from all source frequencies by more than the relative ``tolerance``.
    """
    distance = (target[:, None] / source[None, :] - 1).abs()
    error, index = distance.min(dim=1)
    if bool((error > tolerance).any()):
        return None
    return tuple(index.tolist())
