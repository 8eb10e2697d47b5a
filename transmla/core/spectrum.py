"""Spectra of one source layer: how low the rank of its keys and values is, and how much energy RoPE carries."""

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
    """Energies of one layer; all are fractions of a total.

    Attributes:
        joint: energy [n] of the singular directions of position-free keys and values together, in falling order.
        rotary: energy [p] of each frequency in the scores.
        one_head: fraction [p] of a frequency's energy in the best single key head.
        shared: fraction [p] of a frequency's energy in the best single rotary channel, mixed from all key heads.
        constant: fraction [p] of a frequency's energy that remains if a constant replaces the rotation. This is the
            mean |φ_f|² over the heads, weighted by their energy.
        phase: mean |φ_f| [p] over the heads.
    """

    joint: Tensor
    rotary: Tensor
    one_head: Tensor
    shared: Tensor
    constant: Tensor
    phase: Tensor

    def rank_for(self, share: float) -> int:
        """Return the smallest rank that holds the fraction ``share`` of the joint energy of keys and values."""
        return int((self.joint.cumsum(0) < share).sum()) + 1


def spectrum(weights: LayerWeights, stats: LayerStats, spec: AttentionSpec) -> Spectrum:
    """Return the spectra of one layer, computed in the dtype of ``stats`` (float64 in practice)."""
    attended = regularise(stats.attended_moment)
    frequencies = torch.tensor(spec.inv_freq, dtype=attended.dtype, device=attended.device)
    phi = characteristic(stats.distance_mass, frequencies)
    kappa, query = to_complex(weights.k), to_complex(weights.q)

    constant_keys = to_halves(phi[..., None] * kappa.repeat_interleave(spec.group_size, 0))
    scale = match_channel_norms(constant_keys, weights, attended) / spec.group_size**0.5
    target = torch.cat([(constant_keys * scale).flatten(0, 1), weights.v.flatten(0, 1)])
    root, _ = sqrtm_pair(attended)
    joint = torch.linalg.eigvalsh(root @ (target.mT @ target) @ root).flip(0).clamp_min(0)
    joint = joint[: 2 * spec.num_key_value_heads * spec.head_dim]

    moment = regularise(stats.second_moment).to(query.dtype)
    query_energy = ((query @ moment) * query.conj()).sum(-1).real
    group_energy = query_energy.view(len(kappa), spec.group_size, -1).sum(1)
    by_frequency = (group_energy.sqrt()[..., None] * kappa).transpose(0, 1)
    between_heads = by_frequency @ attended.to(query.dtype) @ by_frequency.mH
    key_energy = ((kappa @ attended.to(kappa.dtype)) * kappa.conj()).sum(-1).real.repeat_interleave(spec.group_size, 0)
    total = between_heads.diagonal(dim1=-2, dim2=-1).real.sum(-1).clamp_min(torch.finfo(attended.dtype).tiny)
    return Spectrum(
        joint / joint.sum().clamp_min(torch.finfo(joint.dtype).tiny),
        total / total.sum(),
        between_heads.diagonal(dim1=-2, dim2=-1).real.amax(-1) / total,
        torch.linalg.eigvalsh(between_heads)[..., -1] / total,
        (query_energy * key_energy * phi.abs().square()).sum(0) / total,
        phi.abs().mean(0),
    )
