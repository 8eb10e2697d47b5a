"""Rotary embedding as complex numbers: one number per frequency, one rotation per position.

RoPE pairs coordinates f and f + d/2 (halves layout) and turns the pair by the angle θ_f·position
(Su et al., arXiv 2104.09864). Written as z_f = x_f + i·x_{f+d/2} it is a product with e^{iθ_f·position}.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_complex(weight: Tensor) -> Tensor:
    """[..., 2p, D] in halves layout → [..., p, D] complex."""
    real, imag = weight.chunk(2, dim=-2)
    return torch.complex(real.contiguous(), imag.contiguous())


def to_halves(weight: Tensor) -> Tensor:
    """[..., p, D] complex → [..., 2p, D] in halves layout."""
    return torch.cat([weight.real, weight.imag], dim=-2)


def halves_to_interleaved(width: int) -> Tensor:
    """Row order that turns halves layout (0, …, d/2, …) into interleaved pairs (0, d/2, 1, d/2 + 1, …)."""
    return torch.arange(width).view(2, width // 2).T.reshape(-1)


def rotate(x: Tensor, inv_freq: Tensor, positions: Tensor) -> Tensor:
    """Turn ``x`` [..., T, 2p] (halves layout) by ``inv_freq`` [p] at ``positions`` [T]."""
    angle = positions.to(x.dtype)[:, None] * inv_freq.to(x.dtype)
    cos, sin = angle.cos(), angle.sin()
    real, imag = x.chunk(2, dim=-1)
    return torch.cat([real * cos - imag * sin, imag * cos + real * sin], dim=-1)


def match_slots(target: Tensor, source: Tensor, *, tolerance: float = 1e-5) -> tuple[int, ...] | None:
    """Index into ``source`` [p] of every frequency of ``target`` [s], or None if one is not there."""
    distance = (target[:, None] / source[None, :] - 1).abs()
    error, index = distance.min(dim=1)
    if bool((error > tolerance).any()):
        return None
    return tuple(index.tolist())
