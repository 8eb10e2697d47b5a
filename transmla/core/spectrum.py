"""What a layer holds before anything is cut: how fast its keys and values decay, and how much its RoPE matters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.artifacts import AttentionSpec, LayerStats, LayerWeights
from transmla.core.linalg import match_channel_norms, regularise, sqrtm_pair
from transmla.core.phase import characteristic
from transmla.core.rope import to_complex, to_halves


@dataclass(frozen=True)
class Spectrum:
    """One layer's energies, all as shares of one.

    ``joint`` [n] of the singular directions of position-free keys and values together, falling; ``rotary`` [p]
    of each frequency in the scores; ``one_head`` and ``shared`` [p] of what a single rotary channel holds of a
    frequency, taken from the best key head or mixed from all of them; ``constant`` [p] of what a constant in
    place of the rotation holds of it, the mean |φ_f|² of the heads by their energy. ``phase`` [p] is the mean |φ_f|.
    """

    joint: Tensor
    rotary: Tensor
    one_head: Tensor
    shared: Tensor
    constant: Tensor
    phase: Tensor

    def rank_for(self, share: float) -> int:
        """The smallest latent that holds ``share`` of the keys' and values' energy."""
        return int((self.joint.cumsum(0) < share).sum()) + 1


def spectrum(weights: LayerWeights, stats: LayerStats, spec: AttentionSpec) -> Spectrum:
    """Measure one layer, in the dtype of ``stats`` (float64 in practice)."""
    attended = regularise(stats.attended_moment)
    frequencies = torch.tensor(spec.inv_freq, dtype=attended.dtype, device=attended.device)
    phi = characteristic(stats.distance_mass, frequencies)
    kappa, query = to_complex(weights.k), to_complex(weights.q)

    still = to_halves(phi[..., None] * kappa.repeat_interleave(spec.group_size, 0))
    scale = match_channel_norms(still, weights, attended) / spec.group_size**0.5
    target = torch.cat([(still * scale).flatten(0, 1), weights.v.flatten(0, 1)])
    root, _ = sqrtm_pair(attended)
    joint = torch.linalg.eigvalsh(root @ (target.mT @ target) @ root).flip(0).clamp_min(0)
    joint = joint[: 2 * spec.num_key_value_heads * spec.head_dim]

    moment = regularise(stats.second_moment).to(query.dtype)
    by_head = ((query @ moment) * query.conj()).sum(-1).real
    energy = by_head.view(len(kappa), spec.group_size, -1).sum(1)
    by_frequency = (energy.sqrt()[..., None] * kappa).transpose(0, 1)
    heads = by_frequency @ attended.to(query.dtype) @ by_frequency.mH
    level = ((kappa @ attended.to(kappa.dtype)) * kappa.conj()).sum(-1).real.repeat_interleave(spec.group_size, 0)
    total = heads.diagonal(dim1=-2, dim2=-1).real.sum(-1).clamp_min(torch.finfo(attended.dtype).tiny)
    return Spectrum(
        joint / joint.sum().clamp_min(torch.finfo(joint.dtype).tiny),
        total / total.sum(),
        heads.diagonal(dim1=-2, dim2=-1).real.amax(-1) / total,
        torch.linalg.eigvalsh(heads)[..., -1] / total,
        (by_head * level * phi.abs().square()).sum(0) / total,
        phi.abs().mean(0),
    )
