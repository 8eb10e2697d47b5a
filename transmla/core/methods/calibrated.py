"""The project's closed form: query-weighted complex concentration, calibrated phase, joint factorisation.

1. Rotary slots take the channels whose rotation matters: complex principal components of the keys,
   weighted by the energy of the queries that read them and by ``need``, the share of a channel that no
   constant can stand for (``core.phase``).
2. Every channel that loses its own rotation keeps the least-squares stand-in of it, head by head, folded
   into W_UK: nothing changes at run time.
3. What is left of the keys and the values share one latent, the data-weighted optimum of a joint target
   whose keys are scaled against the values by mean channel norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerStats, LayerWeights, Plan
from transmla.core.concentrate import Concentration, concentrate
from transmla.core.linalg import latent_basis, regress, regularise
from transmla.core.methods.common import Method, assemble, channel_norm, source_frequencies
from transmla.core.phase import characteristic, stand_in
from transmla.core.rope import to_complex, to_halves

# Keys are scaled by this against values of equal mean channel norm; chosen on validation text.
KEY_WEIGHT = 0.7


def rotary_weight(query: Tensor, moment: Tensor, need: Tensor, plan: Plan) -> Tensor:
    """Importance [G, p] of each key channel's rotation: query energy times ``need`` [H, s, p]."""
    energy = torch.einsum("hpD,DE,hpE->hp", query, moment.to(query.dtype), query.conj()).real
    nearest = torch.zeros_like(energy)
    for slot, own in enumerate(plan.rotary.slots):
        start = own - own % plan.rotary.freqfold
        fold = slice(start, start + plan.rotary.freqfold)
        nearest[:, fold] = torch.maximum(nearest[:, fold], need[:, slot, fold])
    return (energy * nearest).view(-1, plan.spec.group_size, energy.shape[-1]).sum(1)


def factorize(weights: LayerWeights, stats: LayerStats, plan: Plan) -> LayerFactors:
    moment = regularise(stats.second_moment)
    kappa, query = to_complex(weights.k), to_complex(weights.q)
    group = plan.spec.group_size
    frequencies = source_frequencies(plan, moment)
    slots = frequencies[list(plan.rotary.slots)]
    phi = characteristic(stats.distance_mass, frequencies)
    alpha, beta, need = stand_in(stats.distance_mass, frequencies, slots)

    kept: Concentration = concentrate(kappa, moment, rotary_weight(query, moment, need, plan), plan.rotary)
    mix = kept.mix.repeat_interleave(group, 1)
    alpha, beta = alpha.transpose(0, 1), beta.transpose(0, 1)
    residual = kept.residual(kappa).repeat_interleave(group, 0)
    key = to_halves(phi[..., None] * residual + torch.einsum("shp,shp,sD->hpD", beta, mix, kept.z))

    balance = channel_norm(weights.v, moment).mean() / channel_norm(key, moment).mean().clamp_min(1e-30)
    # Heads that share a key ask for nearly the same rows; together they weigh as one.
    share = KEY_WEIGHT * balance / group**0.5
    target = torch.cat([(key * share).flatten(0, 1), weights.v.flatten(0, 1)])
    latent = latent_basis(target, moment, plan.shape.latent_rank)
    return assemble(
        weights,
        plan,
        q_pe=to_halves(torch.einsum("shp,hpD->hsD", (alpha * mix).conj(), query)),
        rope=to_halves(kept.z),
        latent=latent,
        k_up=regress(key, latent, moment),
        v_up=regress(weights.v, latent, moment).repeat_interleave(group, 0),
        inv_freq=slots,
    )


METHOD = Method(
    name="calibrated",
    summary="query-weighted complex RoPE concentration, calibrated phase, joint key/value latent (default)",
    factorize=factorize,
    freqfold=lambda stride: stride,
)
