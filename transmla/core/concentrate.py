"""Concentration of the keys' rotary energy in the few channels that keep RoPE.

The keys of frequency f form a vector κ_f ∈ C^G with one entry per key head. Every complex mixing of heads commutes
with the rotation, so z = wᴴκ_f is a valid rotary channel that all query heads can share. Neighbouring frequencies can
be folded together (FreqFold) if there are fewer slots than frequencies.

TransMLA (arXiv 2502.07864, RoRoPE) mixes heads by a real rotation from an unweighted PCA of the keys. A complex mixing,
weighted by the energy of the queries, costs nothing more at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.artifacts import RotaryPlan


@dataclass(frozen=True)
class Concentration:
    """Complex rotary channels ``z`` [s, D] and their ``mix`` [s, G, p], with κ_{g,f} ≈ Σ_s mix[s, g, f]·z_s."""

    z: Tensor
    mix: Tensor

    def residual(self, kappa: Tensor) -> Tensor:
        """Return ``kappa`` [G, p, D] minus its approximation by the rotary channels, [G, p, D]."""
        return kappa - torch.einsum("sgp,sD->gpD", self.mix, self.z)


def slots_by_fold(rotary: RotaryPlan, pairs: int) -> list[tuple[range, list[int]]]:
    """Return the folds: each run of ``freqfold`` neighbouring frequencies with the slots that use one of them."""
    folds = [range(start, min(start + rotary.freqfold, pairs)) for start in range(0, pairs, rotary.freqfold)]
    return [(fold, [s for s, f in enumerate(rotary.slots) if f in fold]) for fold in folds]


def concentrate(
    kappa: Tensor, moment: Tensor, weight: Tensor, rotary: RotaryPlan, *, real: bool = False
) -> Concentration:
    """Return the principal rotary channels of the keys.

    In each fold with m slots, let u be the top m eigenvectors of W^{1/2} E[κκᴴ] W^{1/2}, where W = diag(``weight``).
    The channels are z = uᴴW^{1/2}κ, and κ ≈ W^{−1/2}u z is the best rank-m approximation in the weighted norm.

    Args:
        kappa: complex keys [G, p, D] as maps of the attention's input.
        moment: E[x xᵀ] [D, D] of this input.
        weight: importance [G, p] of each head and frequency, non-negative. Only ratios matter.
        rotary: the frequencies of the slots and the size of a fold.
        real: restrict the mixing to real rotations, as RoRoPE does.
    """
    heads, pairs, _ = kappa.shape
    z = kappa.new_zeros(len(rotary.slots), kappa.shape[-1])
    mix = kappa.new_zeros(len(rotary.slots), heads, pairs)
    largest = weight.max()
    # If all weights are zero, no rotation has an effect; all channels then count equally.
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
