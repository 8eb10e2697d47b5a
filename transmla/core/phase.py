"""Calibrated phase: the best constant that can stand for a rotation.

A channel without RoPE replaces e^{−iθΔ} by a constant. Under the distances Δ a head really attends to,
with weights a_h(Δ), the least-squares constant is the characteristic function

    φ_h(θ) = Σ_Δ a_h(Δ) e^{−iθΔ},

near one for slow frequencies, near zero for fast ones, with the right phase in between. It is the exact
optimum when conj(q)·k is circular and independent of Δ.
"""

from __future__ import annotations

import torch
from torch import Tensor


def characteristic(distance_mass: Tensor, omega: Tensor) -> Tensor:
    """φ_h(ω) [H, ...] of the distance distribution ``distance_mass`` [H, T] at ``omega`` [...] rad/position.

    A head with no mass at all (it attends to the sink alone) keeps φ = 1: its rotation is never seen.
    """
    distance = torch.arange(distance_mass.shape[-1], dtype=distance_mass.dtype, device=distance_mass.device)
    angle = distance[:, None] * omega.reshape(1, -1)
    wave = torch.complex(angle.cos(), -angle.sin())
    total = distance_mass.sum(-1, keepdim=True)
    value = torch.where(total > 0, distance_mass.to(wave.dtype) @ wave, torch.ones_like(total))
    return value.view(distance_mass.shape[0], *omega.shape)
