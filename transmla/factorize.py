"""From a layer's weights and statistics to the tensors that are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from transmla.artifacts import LayerFactors, LayerStats, LayerWeights, MLAShape, Plan
from transmla.core.linalg import latent_basis, orthonormal_rows, regress, regularise
from transmla.core.norm_identity import NormIdentity, norm_identity
from transmla.errors import TransmlaError
from transmla.native import RMS_NORM_EPS, layer_tensors
from transmla.plan import method_named


@dataclass(frozen=True)
class LatentScale:
    """Mean and largest mean(c²) of a latent over the calibration tokens."""

    mean_square: float
    max_square: float


def factorize(weights: LayerWeights, stats: LayerStats, plan: Plan) -> LayerFactors:
    """Factor one layer in float64 by the plan's method, then compress queries as the plan says.

    Raises:
        TransmlaError: if the result is not finite.
    """
    exact = stats.to(torch.float64)
    factors = method_named(plan.method).factorize(weights.to(torch.float64), exact, plan)
    if plan.shape.q_lora_rank is not None:
        factors = compress_queries(factors, exact, plan.shape.q_lora_rank)
    if not all(bool(t.isfinite().all()) for t in vars(factors).values() if isinstance(t, Tensor)):
        raise TransmlaError(
            f"method '{plan.method}' gave values that are not finite",
            limit="the calibration statistics may be degenerate",
            remedy="use more calibration text, or a smaller rank",
        )
    return factors


def compress_queries(factors: LayerFactors, stats: LayerStats, rank: int) -> LayerFactors:
    """Queries of rank ``rank`` that serve all heads best under the calibration data."""
    moment = regularise(stats.second_moment)
    rows = torch.cat([factors.q_nope, factors.q_pe], 1)
    # Orthonormal rows keep the query latent's norm an identity on any input.
    basis, _ = orthonormal_rows(latent_basis(rows.flatten(0, 1), moment, rank))
    read = regress(rows, basis, moment)
    d_n = factors.q_nope.shape[1]
    return replace(factors, q_nope=read[:, :d_n], q_pe=read[:, d_n:], q_latent=basis)


def pad_factors(f: LayerFactors, shape: MLAShape) -> LayerFactors:
    """Zero-pad latent, position-free width and value width up to ``shape``; exact by construction."""
    rank = shape.kv_lora_rank - f.latent.shape[0]
    nope = shape.qk_nope_head_dim - f.q_nope.shape[1]
    value = shape.v_head_dim - f.v_up.shape[1]
    return replace(
        f,
        q_nope=pad(f.q_nope, (0, 0, 0, nope)),
        latent=pad(f.latent, (0, 0, 0, rank)),
        k_up=pad(f.k_up, (0, rank, 0, nope)),
        v_up=pad(f.v_up, (0, rank, 0, value)),
        o=pad(f.o, (0, value)),
    )


def latent_scale(rows: Tensor, inputs: Iterable[Tensor], width: int) -> LatentScale:
    """Energy of the latent ``rows`` [r, D] over attention ``inputs`` [n, T, D]; ``width`` counts padding."""
    total, largest, count = 0.0, 0.0, 0
    for x in inputs:
        energy = (x @ rows.mT.to(x)).square().sum(-1) / width
        total += float(energy.double().sum())
        largest = max(largest, float(energy.max()))
        count += energy.numel()
    return LatentScale(total / count, largest)


def export_tensors(
    factors: LayerFactors, plan: Plan, inputs: Callable[[], Iterable[Tensor]]
) -> tuple[dict[str, Tensor], LatentScale]:
    """The layer's ``self_attn`` tensors in the native layout, padded to the plan's shape, and its latent's scale.

    ``inputs()`` yields the attention's calibration inputs; it is called once for each latent.
    """
    dtype = getattr(torch, plan.dtype)
    factors = pad_factors(factors, plan.shape)

    def identity(rows: Tensor) -> tuple[NormIdentity, LatentScale]:
        scale = latent_scale(rows, inputs(), rows.shape[0])
        return norm_identity(scale.mean_square, scale.max_square, RMS_NORM_EPS, dtype), scale

    kv_norm, scale = identity(factors.latent)
    q_norm = None if factors.q_latent is None else identity(factors.q_latent)[0]
    return layer_tensors(factors, plan.shape, kv_norm, q_norm, dtype), scale
