"""TransMLA as published: RoRoPE, FreqFold and balanced joint PCA (arXiv 2502.07864, sections 4.2–4.4).

The baseline every other method is compared with. Keys are rotated by real, unweighted PCA across heads
and folded frequencies; channels outside the rotary slice drop their rotation (phase one); keys and values
are scaled to equal mean channel norm, the keys' taken in the rotated basis, and compressed by one uncentred PCA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerStats, LayerWeights, Plan, RotaryPlan
from transmla.core.concentrate import Concentration, concentrate, slots_by_fold
from transmla.core.linalg import latent_basis, match_channel_norms, orthonormal_rows, regress, regularise
from transmla.core.methods.base import Method, assemble, source_frequencies
from transmla.core.rope import to_complex, to_halves


def rotate_keys(kappa: Tensor, moment: Tensor, rotary: RotaryPlan) -> tuple[Concentration, Tensor]:
    """RoRoPE: the channels that keep RoPE, and the others [n, D] in the basis of the same rotation."""
    heads, pairs, _ = kappa.shape
    uniform = torch.ones(heads, pairs, dtype=moment.dtype, device=moment.device)
    every = RotaryPlan(tuple(f for f in range(pairs) for _ in range(heads)), rotary.freqfold)
    rotated = concentrate(kappa, moment, uniform, every, real=True)
    kept = torch.zeros(len(every.slots), dtype=torch.bool, device=moment.device)
    for (_, all_slots), (_, slots) in zip(slots_by_fold(every, pairs), slots_by_fold(rotary, pairs), strict=True):
        kept[all_slots[: len(slots)]] = True
    return Concentration(rotated.z[kept], rotated.mix[kept]), to_halves(rotated.z[~kept])


def read_out(weights: LayerWeights, plan: Plan, kept: Concentration, latent: Tensor, moment: Tensor) -> LayerFactors:
    """The layer whose rotary channels are ``kept`` and whose other keys and values are read from ``latent`` [r, D]."""
    kappa, query = to_complex(weights.k), to_complex(weights.q)
    group = plan.spec.group_size
    mix = kept.mix.repeat_interleave(group, 1)
    latent, _ = orthonormal_rows(latent)  # dead keys or values would leave rows of zeros
    return assemble(
        weights,
        plan,
        q_pe=to_halves(torch.einsum("shp,hpD->hsD", mix.conj(), query)),
        rope=to_halves(kept.z),
        latent=latent,
        k_up=regress(to_halves(kept.residual(kappa)), latent, moment).repeat_interleave(group, 0),
        v_up=regress(weights.v, latent, moment).repeat_interleave(group, 0),
        inv_freq=source_frequencies(plan, moment)[list(plan.rotary.slots)],
    )


def remove_rope(weights: LayerWeights, stats: LayerStats, plan: Plan) -> LayerFactors:
    """Phase one: channels outside the rotary slice lose their rotation, nothing is cut."""
    moment = regularise(stats.second_moment)
    kept, _ = rotate_keys(to_complex(weights.k), moment, plan.rotary)
    everything = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    return read_out(weights, plan, kept, everything, moment)


def factorize(weights: LayerWeights, stats: LayerStats, plan: Plan) -> LayerFactors:
    """Both phases; the second measures what the layers before it make of the text without their RoPE."""
    kept, rest = rotate_keys(to_complex(weights.k), regularise(stats.second_moment), plan.rotary)
    moment = regularise(stats.second_moment if stats.converted_moment is None else stats.converted_moment)
    scale = match_channel_norms(rest, weights, moment)
    target = torch.cat([rest * scale, weights.v.flatten(0, 1)])
    return read_out(weights, plan, kept, latent_basis(target, moment, plan.shape.latent_rank), moment)


METHOD = Method(
    name="transmla",
    summary="TransMLA as published: real RoRoPE, FreqFold, balanced joint PCA (the baseline)",
    factorize=factorize,
    freqfold=lambda stride: 2 * stride,
    first_pass=remove_rope,
    baseline=True,
)
