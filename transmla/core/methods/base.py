"""What every method is, and the pieces they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerStats, LayerWeights, Plan
from transmla.core.factors import orthonormal_latents
from transmla.registry import lookup


@dataclass(frozen=True)
class Method:
    """A way to factor one attention layer.

    ``factorize(weights, stats, plan)`` works in float64 and never changes its input; ``freqfold(stride)``
    is the method's own choice of how many neighbouring frequencies to fold when every ``stride``-th source
    frequency keeps a rotary slot. A method of two phases gives the layer after its ``first_pass``: a second
    hidden stream runs through those layers, and ``factorize`` finds its moments in ``stats.converted_moment``.
    A ``baseline`` method is there to be compared with: it is not fitted any further unless asked for.
    """

    name: str
    summary: str
    factorize: Callable[[LayerWeights, LayerStats, Plan], LayerFactors]
    freqfold: Callable[[int], int]
    first_pass: Callable[[LayerWeights, LayerStats, Plan], LayerFactors] | None = None
    baseline: bool = False


def source_frequencies(plan: Plan, like: Tensor) -> Tensor:
    """The source's ``inv_freq`` [p] as a tensor like ``like``."""
    return torch.tensor(plan.spec.inv_freq, dtype=like.dtype, device=like.device)


def assemble(
    weights: LayerWeights,
    plan: Plan,
    *,
    q_pe: Tensor,
    rope: Tensor,
    latent: Tensor,
    k_up: Tensor,
    v_up: Tensor,
    inv_freq: Tensor,
) -> LayerFactors:
    """Factors of a layer whose position-free queries and output projection are the source's own."""
    gain = plan.spec.attention_factor**2
    factors = LayerFactors(
        # yarn scales cos and sin, so only the rotary part of a runtime's score carries its gain.
        q_nope=weights.q * gain,
        q_pe=q_pe,
        latent=latent,
        rope=rope,
        k_up=k_up,
        v_up=v_up,
        o=weights.o,
        inv_freq=inv_freq,
        scaling=plan.spec.scaling,
        rope_gain=gain,
        rules=weights.rules,
    )
    return orthonormal_latents(factors)


def method_named(name: str) -> Method:
    """The conversion method called ``name``."""
    method: Method = lookup("transmla.core.methods", "METHOD", name, kind="method")
    return method
