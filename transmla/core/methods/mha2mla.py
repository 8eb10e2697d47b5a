"""MHA2MLA's joint SVD of keys and values: the weights alone, no data (arXiv 2502.14837, section 3.2).

For comparison. MHA2MLA caches rotary keys of every head, frequencies chosen head by head, which no shared
rotary key can hold; here RoPE is concentrated as TransMLA does, and what it leaves, [k ; v], is cut by its
plain singular values.
"""

from __future__ import annotations

import torch

from transmla.artifacts import LayerFactors, LayerStats, LayerWeights, Plan
from transmla.core.linalg import latent_basis, regularise
from transmla.core.methods.base import Method
from transmla.core.methods.transmla import read_out, rotate_keys
from transmla.core.rope import to_complex


def factorize(weights: LayerWeights, stats: LayerStats, plan: Plan) -> LayerFactors:
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
