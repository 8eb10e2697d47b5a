"""Calibrated phase: the best constants that can stand for a rotation.

A channel without RoPE replaces e^{−iθΔ} by a constant. Under the distances Δ a head really attends to,
with weights a_h(Δ), the least-squares constant is the characteristic function

    φ_h(θ) = Σ_Δ a_h(Δ) e^{−iθΔ},

near one for slow frequencies, near zero for fast ones, with the right phase in between. A channel of
frequency θ_f that is read through a rotary slot of another frequency θ_s has two stand-ins, the slot's
rotation and a constant: e^{−iθ_fΔ} ≈ α e^{−iθ_sΔ} + β, again by least squares under a_h.
Both are exact optima when conj(q)·k is circular and independent of Δ.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this the slot turns so slowly that its rotation and a constant cannot be told apart.
_DEGENERATE = 1e-9


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


def stand_in(distance_mass: Tensor, channel: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(α, β, need), each [H, s, p], for reading ``channel`` [p] through ``slot`` [s] frequencies.

    ``need`` is the share of the channel's energy that only the slot's rotation can carry: the squared
    partial correlation of e^{−iθ_fΔ} with e^{−iθ_sΔ} given the constant; 1 − |φ|² when θ_f = θ_s.
    """
    phi_channel = characteristic(distance_mass, channel)[:, None, :]
    phi_slot = characteristic(distance_mass, slot)[:, :, None]
    phi_between = characteristic(distance_mass, channel[None, :] - slot[:, None])
    spread = (1 - phi_slot.abs().square()).clamp_min(_DEGENERATE)
    partial = phi_between - phi_slot.conj() * phi_channel
    alpha = partial / spread
    same = channel[None, :] == slot[:, None]
    alpha = torch.where(same, torch.ones_like(alpha), alpha)
    return alpha, phi_channel - phi_slot * alpha, partial.abs().square() / spread
