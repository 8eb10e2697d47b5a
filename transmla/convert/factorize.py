"""From a layer's weights and statistics to the tensors that are written."""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerStats, LayerWeights, Plan
from transmla.core.factors import compress_queries
from transmla.core.methods.base import method_named
from transmla.errors import TransmlaError


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
