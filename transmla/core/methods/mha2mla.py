"""MHA2MLA: joint SVD of the weights of keys and values, without data (arXiv 2502.14837, section 3.2).

A baseline for comparison. MHA2MLA caches rotary keys of every head and chooses frequencies for each head. A shared
rotary key cannot hold these keys, so RoPE is concentrated as in TransMLA here. The rest of the keys and the values,
[k ; v], are approximated by their largest singular values.
"""

from __future__ import annotations

import torch

from transmla.artifacts import LayerFactors, LayerStats, LayerWeights, Plan
from transmla.core.linalg import latent_basis, regularise
from transmla.core.methods.base import Method
from transmla.core.methods.transmla import read_out, rotate_keys
from transmla.core.rope import to_complex


def factorize(weights: LayerWeights, stats: LayerStats, plan: Plan) -> LayerFactors:
    """Return the factors of one layer by MHA2MLA, section 3.2; shapes as in ``LayerFactors``."""
    kept, rest = rotate_keys(to_complex(weights.k), regularise(stats.second_moment), plan.rotary)
    identity = torch.eye(rest.shape[1], dtype=rest.dtype, device=rest.device)
    latent = latent_basis(torch.cat([rest, weights.v.flatten(0, 1)]), identity, plan.shape.latent_rank)
    return read_out(weights, plan, kept, latent, identity)


METHOD = Method(
    name="mha2mla",
    summary="MHA2MLA's joint SVD of the weights alone, after TransMLA's RoRoPE (for comparison)",
    factorize=factorize,
    freqfold=lambda stride: 2 * stride,
    baseline=True,
)
