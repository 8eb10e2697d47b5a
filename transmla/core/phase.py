"""Calibrated phase φ: the best constant in place of a rotation.

A key channel without RoPE replaces the rotation e^{−iθΔ} by a constant. Let a_h(Δ) be the share of head h's attention
at distance Δ on the calibration text. The least-squares constant is the characteristic function

    φ_h(θ) = Σ_Δ a_h(Δ) e^{−iθΔ}.

|φ| is near one for slow frequencies and near zero for fast ones. The constant is the exact optimum if conj(q)·k is
circular and independent of Δ.
"""

from __future__ import annotations

import torch
from torch import Tensor


def characteristic(distance_mass: Tensor, omega: Tensor) -> Tensor:
    """Return φ_h(ω) [H, ...] of each head at the frequencies ``omega``.

    A head that attends to the sink token only has no mass. Its rotation has no effect, so φ is 1.

    Args:
        distance_mass: attention mass [H, T] at each distance Δ; a row sums to one, or to zero.
        omega: frequencies [...] in radians per position.
    """
    distance = torch.arange(distance_mass.shape[-1], dtype=distance_mass.dtype, device=distance_mass.device)
    angle = distance[:, None] * omega.reshape(1, -1)
    wave = torch.complex(angle.cos(), -angle.sin())
    total = distance_mass.sum(-1, keepdim=True)
    value = torch.where(total > 0, distance_mass.to(wave.dtype) @ wave, torch.ones_like(total))
    return value.view(distance_mass.shape[0], *omega.shape)
