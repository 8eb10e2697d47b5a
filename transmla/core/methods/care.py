"""CARE: a joint low rank of keys and values weighted by their covariance (arXiv 2603.17946, section 3.1).

For comparison. RoPE is concentrated as TransMLA does; then y = [b·k ; v], the scaled rest of the keys and
the values, is replaced by U·D·y, where the rank-r product minimises the error of what is *read* from y, keys
with their scale undone, under the damped second moment H = E[y yᵀ] + δI: the singular vectors of S·H^{1/2}.
The published code keeps δ at a tenth of the mean diagonal.
"""

from __future__ import annotations

import torch

from transmla.artifacts import LayerFactors, LayerStats, LayerWeights, Plan
from transmla.core.linalg import latent_basis, match_channel_norms, regularise
from transmla.core.methods.base import Method
from transmla.core.methods.transmla import read_out, rotate_keys
from transmla.core.rope import to_complex

DAMPING = 0.1


def factorize(weights: LayerWeights, stats: LayerStats, plan: Plan) -> LayerFactors:
    moment = regularise(stats.second_moment)
    kept, rest = rotate_keys(to_complex(weights.k), moment, plan.rotary)
    values = weights.v.flatten(0, 1)
    scale = match_channel_norms(rest, weights, moment)
    outputs = torch.cat([rest * scale, values])
    read = torch.cat([(1 / scale).expand(len(rest)), torch.ones_like(values[:, 0])])
    damped = regularise(outputs @ moment @ outputs.mT, DAMPING)
    rows = latent_basis(torch.diag(read), damped, plan.shape.latent_rank)
    return read_out(weights, plan, kept, rows @ outputs, moment)


METHOD = Method(
    name="care",
    summary="CARE as published: TransMLA's RoRoPE, covariance-weighted joint SVD (for comparison)",
    factorize=factorize,
    freqfold=lambda stride: 2 * stride,
    baseline=True,
)
