"""The default method: a closed form with calibrated phase, attention-weighted moments and a joint read-out.

Moments weight each token by the squared attention weights that the token receives. An error on key or value j changes
head h's output at position i in proportion to a_ij, so its energy counts with a_ij². The method has three steps:

1. The rotary slots take the complex principal components of the keys (``core.concentrate``). Their weights are the
   energy of the queries, times 1 − |φ|². This is the fraction of a channel that no constant can replace
   (``core.phase``).
2. One latent serves the values and the part of the keys that the slots do not supply. It is the optimal rank-r
   projection of both. Keys are scaled relative to values by their mean channel norms.
3. Every head reads its rotated keys from the latent and all slots together (``core.readout``). The coefficients become
   part of W_UK and of the rotary queries, so the run-time computation is plain MLA.

Normed keys have large constant components at a few frequencies. A constant key costs the softmax nothing until it is
rotated, and the share of a few tokens in Σ a² says little about the output. If the export may store any frequencies for
such a layer (``RotaryPlan.measured``), the same three steps therefore use the sensitivity of the attention's output
(``artifacts.Sensitivity``). The slots are chosen by ``core.choose_slots``. The latent is the best one for key errors
and value errors, each measured in the output and weighted by their own tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerStats, LayerWeights, Plan, Sensitivity
from transmla.core.choose_slots import choose_slots
from transmla.core.concentrate import concentrate
from transmla.core.linalg import (
    channel_norm,
    latent_basis,
    latent_of_two,
    match_channel_norms,
    regress,
    regularise,
    sqrtm_pair,
)
from transmla.core.methods.base import Method, assemble, source_frequencies
from transmla.core.phase import characteristic
from transmla.core.readout import Distances, joint_readout
from transmla.core.rope import to_complex, to_halves

# Factor on the keys when the latent is chosen, relative to values of equal mean channel norm. Chosen from 0.2 to 2 on
# WikiText-2 validation text: 0.35 to 0.7 differ by less than 5 %, and 0.2 and 2 are clearly worse.
KEY_WEIGHT = 0.5
# Every query channel counts with at least this share of the mean energy, because the energies are those of some text.
QUERY_FLOOR = 0.05


def rotary_weight(query: Tensor, moment: Tensor, phi: Tensor, group: int) -> Tensor:
    """Return the importance [G, p] of the rotation of each key channel.

    Args:
        query: complex queries [H, p, D] as maps of the attention's input.
        moment: E[x xᵀ] [D, D] of this input.
        phi: φ [H, p] at the channels' frequencies.
        group: number H/G of query heads that share one key head.
    """
    energy = ((query @ moment.to(query.dtype)) * query.conj()).sum(-1).real
    return (energy * (1 - phi.abs().square())).view(-1, group, phi.shape[-1]).sum(1)


def factorize(weights: LayerWeights, stats: LayerStats, plan: Plan) -> LayerFactors:
    """Return the factors of one layer by the three steps above; shapes as in ``LayerFactors``."""
    if plan.rotary.measured:
        assert stats.sensitivity is not None
        return _factorize_measured(weights, stats.sensitivity, plan)
    attended = regularise(stats.attended_moment)
    kappa, query = to_complex(weights.k), to_complex(weights.q)
    group = plan.spec.group_size
    frequencies = source_frequencies(plan, attended)
    slots = frequencies[list(plan.rotary.slots)]
    distances = Distances.measure(stats.distance_mass, frequencies, slots)

    weight = rotary_weight(query, regularise(stats.second_moment), distances.channel, group)
    kept = concentrate(kappa, attended, weight, plan.rotary)
    no_latent = attended.new_zeros(0, attended.shape[0])
    _, slot_readout = joint_readout(kappa, no_latent, kept.z, kept.mix, attended, distances)
    # Heads of a group have the same key on channels that are not rotated. Subtracting each head's read-out from the
    # slots would make the keys different and cost more rank.
    slot_readout = slot_readout * ~distances.is_unrotated[:, None]
    constant_keys = distances.channel[..., None] * kappa.repeat_interleave(group, 0)
    key = to_halves(constant_keys - (slot_readout * distances.slot[:, None]) @ kept.z)
    del constant_keys, slot_readout  # each has the size of all queries

    # Heads that share a key need nearly the same rows, so together they count as one head.
    key_scale = KEY_WEIGHT * match_channel_norms(key, weights, attended) / group**0.5
    target = torch.cat([(key * key_scale).flatten(0, 1), weights.v.flatten(0, 1)])
    del key
    latent = latent_basis(target, attended, plan.shape.latent_rank)
    del target

    from_latent, from_slots = joint_readout(kappa, latent, kept.z, kept.mix, attended, distances)
    return assemble(
        weights,
        plan,
        q_pe=to_halves(from_slots.conj().mT @ query),
        rope=to_halves(kept.z),
        latent=latent,
        k_up=to_halves(from_latent),
        v_up=regress(weights.v, latent, attended).repeat_interleave(group, 0),
        inv_freq=slots,
    )


def _factorize_measured(weights: LayerWeights, stats: Sensitivity, plan: Plan) -> LayerFactors:
    """Return the factors of one layer, with slots and latent that keep the attention's output."""
    # Keys and values read a part of the features only: their own, without those of the queries.
    used = torch.cat([weights.k, weights.v]).flatten(0, 1).any(0).nonzero()[:, 0]
    keys, values = weights.k[..., used], weights.v[..., used]
    key_moment, value_moment = (regularise(m[used][:, used]) for m in (stats.key_moment, stats.value_moment))
    kappa, heads = to_complex(keys), len(weights.q)
    group, pairs = plan.spec.group_size, kappa.shape[1]
    frequencies = source_frequencies(plan, key_moment)
    query = stats.query_moment * plan.spec.scaling**2
    energy = query.diagonal(dim1=1, dim2=2)
    query = query + torch.diag_embed(QUERY_FLOOR * energy.mean(-1, keepdim=True).expand_as(energy))

    importance = query.diagonal(dim1=1, dim2=2) * stats.head_share[:, None]
    phi = characteristic(stats.distance_mass, frequencies)
    kernel = characteristic(stats.distance_mass, frequencies[:, None] - frequencies)
    kernel = kernel - phi[:, :, None] * phi[:, None].conj()
    head_weight = (importance.sum(-1) / importance.sum()).to(kernel.dtype)
    channels = kappa.flatten(0, 1)
    mix, slots = choose_slots(
        channels @ key_moment.to(channels.dtype) @ channels.mH,
        importance.view(-1, group, 2, pairs).sum((1, 2)),
        (head_weight[:, None, None] * kernel).sum(0),
        len(plan.rotary.slots),
    )
    z, inv_freq = mix @ channels, frequencies[list(slots)]
    # Unit energies: ``joint_readout`` adds a common ridge.
    z = z / (z @ key_moment.to(z.dtype) * z.conj()).sum(-1, keepdim=True).real.sqrt()
    distances = Distances.measure(stats.distance_mass, frequencies, inv_freq)
    no_mix = z.new_zeros(len(z), *kappa.shape[:2])

    no_latent = key_moment.new_zeros(0, len(used))
    _, slot_readout = joint_readout(kappa, no_latent, z, no_mix, key_moment, distances)
    slot_readout = slot_readout * ~distances.is_unrotated[:, None]
    constant_keys = distances.channel[..., None] * kappa.repeat_interleave(group, 0)
    key = to_halves(constant_keys - (slot_readout * distances.slot[:, None]) @ z)
    scores = sqrtm_pair(query)[0] * stats.head_share[:, None, None].sqrt() @ key
    output = weights.o.mT @ weights.o
    outputs = sqrtm_pair(output.view(-1, group, *output.shape[1:]).mean(1) / len(values))[0] @ values
    targets, moments = (scores.flatten(0, 1), outputs.flatten(0, 1)), (key_moment, value_moment)
    latent = latent_of_two(*targets, moments, plan.shape.latent_rank)
    latent = latent / channel_norm(latent, key_moment)[:, None]

    from_latent, from_slots = joint_readout(kappa, latent, z, no_mix, key_moment, distances)
    everywhere = key_moment.new_zeros(len(used), weights.k.shape[-1])
    everywhere[torch.arange(len(used), device=used.device), used] = 1
    return assemble(
        weights,
        plan,
        q_pe=to_halves(from_slots.conj().mT @ to_complex(weights.q)),
        rope=to_halves(z) @ everywhere,
        latent=latent @ everywhere,
        k_up=to_halves(from_latent),
        v_up=regress(values, latent, value_moment).repeat_interleave(heads // len(values), 0),
        inv_freq=inv_freq,
    )


METHOD = Method(
    name="calibrated",
    summary="attention-weighted, calibrated phase, joint read-out of latent and rotary channels (default)",
    factorize=factorize,
    freqfold=lambda stride: stride,
    chooses_slots=True,
)
