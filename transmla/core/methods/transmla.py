"""TransMLA as published: RoRoPE, FreqFold and balanced joint PCA (arXiv 2502.07864, sections 4.2–4.4).

The baseline for all other methods. The method has two passes:

1. A real, unweighted PCA across heads and folded frequencies gives the key channels that keep RoPE. The other channels
   lose their rotation.
2. The other keys, in the basis of this PCA, and the values are scaled to equal mean channel norm. One uncentred PCA
   compresses both.
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
    """Apply RoRoPE (section 4.2) with FreqFold (section 4.3).

    Args:
        kappa: complex keys [G, p, D].
        moment: E[x xᵀ] [D, D].
        rotary: the rotary slots and the size of a fold.

    Returns:
        The channels that keep RoPE, and the other channels [n, D] in the rotated basis, in halves layout.
    """
    heads, pairs, _ = kappa.shape
    uniform = torch.ones(heads, pairs, dtype=moment.dtype, device=moment.device)
    every = RotaryPlan(tuple(f for f in range(pairs) for _ in range(heads)), rotary.freqfold)
    rotated = concentrate(kappa, moment, uniform, every, real=True)
    kept = torch.zeros(len(every.slots), dtype=torch.bool, device=moment.device)
    for (_, all_slots), (_, slots) in zip(slots_by_fold(every, pairs), slots_by_fold(rotary, pairs), strict=True):
        kept[all_slots[: len(slots)]] = True
    return Concentration(rotated.z[kept], rotated.mix[kept]), to_halves(rotated.z[~kept])


def read_out(weights: LayerWeights, plan: Plan, kept: Concentration, latent: Tensor, moment: Tensor) -> LayerFactors:
    """Return the layer with given rotary channels and latent.

    Args:
        weights: the source's weights.
        plan: the plan of the layer.
        kept: the channels that keep RoPE.
        latent: rows [r, D]; the other keys and the values are read from them by regression.
        moment: E[x xᵀ] [D, D], the metric of the regression.
    """
    kappa, query = to_complex(weights.k), to_complex(weights.q)
    group = plan.spec.group_size
    mix = kept.mix.repeat_interleave(group, 1)
    # Keys or values of zero give latent rows of zero, with which the regression would be singular.
    latent, _ = orthonormal_rows(latent)
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
    """Return the layer after the first pass: only the rotary slice keeps its rotation, the rank is full."""
    moment = regularise(stats.second_moment)
    kept, _ = rotate_keys(to_complex(weights.k), moment, plan.rotary)
    everything = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    return read_out(weights, plan, kept, everything, moment)


def factorize(weights: LayerWeights, stats: LayerStats, plan: Plan) -> LayerFactors:
    """Return the factors of one layer after both passes; shapes as in ``LayerFactors``.

    The PCA uses ``stats.converted_moment`` if present: the inputs that the earlier layers give after the first pass.
    """
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
