"""Factor a layer's weights into MLA factors, from its statistics on calibration text."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerStats, LayerWeights, Plan
from transmla.core.factors import compress_queries
from transmla.core.methods.base import method_named
from transmla.errors import TransmlaError
from transmla.ranks import Ranks


def factorize(weights: LayerWeights, stats: LayerStats, plan: Plan) -> LayerFactors:
    """Factor one layer in float64 with the plan's method, then compress the queries if the plan has a query rank.

    Args:
        weights: the source layer's attention weights.
        stats: the layer's statistics on calibration text.
        plan: the plan for this layer alone.

    Raises:
        TransmlaError: if a factor is NaN or infinite.
    """
    exact = stats.to(torch.float64)
    factors = method_named(plan.method).factorize(weights.to(torch.float64), exact, plan)
    if plan.shape.q_lora_rank is not None:
        factors = compress_queries(factors, exact, plan.shape.q_lora_rank)
    if not all(bool(t.isfinite().all()) for t in vars(factors).values() if isinstance(t, Tensor)):
        raise TransmlaError(
            f"method '{plan.method}' gave NaN or infinite weights",
            limit="the calibration statistics may be degenerate",
            remedy="use more calibration text, or a smaller rank",
        )
    return factors


def from_first(factors: LayerFactors, ranks: Ranks) -> LayerFactors:
    """Return the first process's ``factors`` in all processes, whose decompositions may round differently."""
    if ranks.size == 1:
        return factors
    device = factors.latent.device
    tensors = {name: t.to(device).contiguous() for name, t in vars(factors).items() if isinstance(t, Tensor)}
    ranks.copy_first(*tensors.values())
    return replace(factors, **tensors)  # type: ignore[arg-type]
