"""What every method is, and the pieces they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerStats, LayerWeights, Plan
from transmla.core.coordinates import orthonormal_latents


@dataclass(frozen=True)
class Method:
    """A way to factor one attention layer.

    ``factorize(weights, stats, plan)`` works in float64 and never changes its input; ``freqfold(stride)``
    is the method's own choice of how many neighbouring frequencies to fold when every ``stride``-th source
    frequency keeps a rotary slot. A method of two phases gives the layer after its ``first_phase``: a second
    hidden stream runs through those layers, and ``factorize`` finds its moments in ``stats.converted_moment``.
    A ``published`` method is there to be compared with: it is not fitted any further unless asked for.
    """

    name: str
    summary: str
    factorize: Callable[[LayerWeights, LayerStats, Plan], LayerFactors]
    freqfold: Callable[[int], int]
    first_phase: Callable[[LayerWeights, LayerStats, Plan], LayerFactors] | None = None
    published: bool = False


def source_frequencies(plan: Plan, like: Tensor) -> Tensor:
    """The source's ``inv_freq`` [p] as a tensor like ``like``."""
    return torch.tensor(plan.spec.inv_freq, dtype=like.dtype, device=like.device)


def channel_norm(weight: Tensor, moment: Tensor) -> Tensor:
    """Root mean square [..., n] of every output channel of ``weight`` [..., n, D] under ``moment`` [D, D]."""
    return ((weight @ moment) * weight).sum(-1).clamp_min(0).sqrt()


def balance(rest: Tensor, weights: LayerWeights, moment: Tensor) -> Tensor:
    """The factor that gives ``rest``, what the rotary channels left of the keys, the values' mean channel norm.

    Neither counts as less than a thousandth of the keys or values it comes from: rounding errors are all that is
    left where the rotary key holds everything, and they may claim no latent.
    """
    keys, values = channel_norm(weights.k, moment).mean(), channel_norm(weights.v, moment).mean()
    left = torch.maximum(channel_norm(rest, moment).mean(), keys * 1e-3).clamp_min(1e-30)
    return torch.maximum(values, left * 1e-3) / left


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
