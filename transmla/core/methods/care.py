"""CARE: covariance-weighted joint low-rank approximation of keys and values (arXiv 2603.17946, section 3.1).

A baseline for comparison. RoPE is concentrated as in TransMLA. Let y = [b·k ; v] hold the values and the rest of the
keys, scaled by b. CARE replaces y by a rank-r product U·D·y. The product minimises the error of S·y, which undoes the
keys' scale, under the damped second moment H = E[y yᵀ] + δI. Its rows are the singular vectors of S·H^{1/2}.
"""

from __future__ import annotations

import torch

from transmla.artifacts import LayerFactors, LayerStats, LayerWeights, Plan
from transmla.core.linalg import latent_basis, match_channel_norms, regularise
from transmla.core.methods.base import Method
from transmla.core.methods.transmla import read_out, rotate_keys
from transmla.core.rope import to_complex

# δ as a fraction of the mean diagonal of E[y yᵀ]; the value of the published code.
DAMPING = 0.1


def factorize(weights: LayerWeights, stats: LayerStats, plan: Plan) -> LayerFactors:
    """Return the factors of one layer by CARE, section 3.1; shapes as in ``LayerFactors``."""
    moment = regularise(stats.second_moment)
    kept, rest = rotate_keys(to_complex(weights.k), moment, plan.rotary)
    values = weights.v.flatten(0, 1)
    scale = match_channel_norms(rest, weights, moment)
    outputs = torch.cat([rest * scale, values])
    undo_scale = torch.cat([(1 / scale).expand(len(rest)), torch.ones_like(values[:, 0])])
    damped = regularise(outputs @ moment @ outputs.mT, DAMPING)
    rows = latent_basis(torch.diag(undo_scale), damped, plan.shape.latent_rank)
    return read_out(weights, plan, kept, rows @ outputs, moment)


METHOD = Method(
    name="care",
    summary="CARE as published: TransMLA's RoRoPE, covariance-weighted joint SVD (for comparison)",
    factorize=factorize,
    freqfold=lambda stride: 2 * stride,
    baseline=True,
)
