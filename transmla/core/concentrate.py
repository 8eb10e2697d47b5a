"""Concentrating rotary energy into the few channels that keep RoPE.

For one frequency f stack the key heads into κ_f ∈ C^G. Any complex mixing of heads commutes with the
rotation, so z = wᴴκ_f is a legal rotary channel shared by every query head. Neighbouring frequencies may
be folded together (FreqFold) when there are fewer slots than frequencies. TransMLA (arXiv 2502.07864,
RoRoPE) uses a real rotation found by unweighted key PCA; a complex one weighted by what the queries read
costs nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.artifacts import RotaryPlan


@dataclass(frozen=True)
class Concentration:
    """``z`` [s, D] complex rotary channels and ``mix`` [s, G, p]: κ_{g,f} ≈ Σ_s mix[s, g, f]·z_s."""

    z: Tensor
    mix: Tensor

    def residual(self, kappa: Tensor) -> Tensor:
        """What the rotary channels leave of ``kappa`` [G, p, D]."""
        return kappa - torch.einsum("sgp,sD->gpD", self.mix, self.z)


def slots_by_fold(rotary: RotaryPlan, pairs: int) -> list[tuple[range, list[int]]]:
    """For each run of ``freqfold`` neighbouring frequencies: the run, and the slots that turn within it."""
    folds = [range(start, min(start + rotary.freqfold, pairs)) for start in range(0, pairs, rotary.freqfold)]
    return [(fold, [s for s, f in enumerate(rotary.slots) if f in fold]) for fold in folds]


def concentrate(
    kappa: Tensor, moment: Tensor, weight: Tensor, rotary: RotaryPlan, *, real: bool = False
) -> Concentration:
    """Principal rotary channels of the keys.

    Args:
        kappa: complex keys [G, p, D] as maps of the attention input.
        moment: E[x xᵀ] [D, D] of that input.
        weight: importance of each (head, frequency) channel [G, p], non-negative.
        rotary: which frequencies the slots turn with, and how many are folded together.
        real: restrict the mixing to real rotations, as RoRoPE does.

    For each fold, the top eigenvectors u of D^{1/2} E[κκᴴ] D^{1/2} (D = diag of the weights) give
    z = uᴴD^{1/2}κ and κ ≈ D^{−1/2}u z: the best rank-m approximation in the weighted norm.
    """
    heads, pairs, _ = kappa.shape
    z = kappa.new_zeros(len(rotary.slots), kappa.shape[-1])
    mix = kappa.new_zeros(len(rotary.slots), heads, pairs)
    largest = weight.max()
    # Only ratios matter; where no rotation is ever seen, all channels count the same.
    weight = torch.where(largest > 0, weight / largest, torch.ones_like(weight)).clamp_min(1e-12)
    for fold, slots in slots_by_fold(rotary, pairs):
        if not slots:
            continue
        keys = kappa[:, fold.start : fold.stop].reshape(-1, kappa.shape[-1])
        root = weight[:, fold.start : fold.stop].reshape(-1).sqrt().to(keys.dtype)
        covariance = keys @ moment.to(keys.dtype) @ keys.mH
        if real:
            covariance = covariance.real.to(keys.dtype)
        _, vectors = torch.linalg.eigh(root[:, None] * covariance * root)
        for slot, u in zip(slots, vectors.flip(-1).T, strict=False):
            z[slot] = (u.conj() * root) @ keys
            mix[slot, :, fold.start : fold.stop] = (u / root).view(heads, len(fold))
    return Concentration(z, mix)
