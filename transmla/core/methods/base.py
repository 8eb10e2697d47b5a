"""The contract of a conversion method, and functions that several methods use."""

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

    Attributes:
        name: the value of ``--method``.
        summary: one line for ``--help``.
        factorize: function of weights, statistics and plan that returns the factors. It works in float64 and does not
            change its arguments.
        freqfold: the method's preferred number of neighbouring frequencies to fold, as a function of the stride: every
            stride-th source frequency keeps a rotary slot.
        first_pass: for a method with two passes, a function that returns the layer after the first pass. A second
            copy of the hidden states runs through these layers, and ``factorize`` reads its second moment from
            ``stats.converted_moment``.
        chooses_slots: whether the method can choose each layer's rotary slots from ``stats.sensitivity``.
        baseline: whether the method is for comparison only. Its factors are then not fitted by default.
    """

    name: str
    summary: str
    factorize: Callable[[LayerWeights, LayerStats, Plan], LayerFactors]
    freqfold: Callable[[int], int]
    first_pass: Callable[[LayerWeights, LayerStats, Plan], LayerFactors] | None = None
    chooses_slots: bool = False
    baseline: bool = False


def source_frequencies(plan: Plan, like: Tensor) -> Tensor:
    """Return the source's ``inv_freq`` [p] as a tensor with the dtype and device of ``like``."""
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
    """Return factors that keep the source's queries (as ``q_nope``), output projection and score rules.

    The other arguments are fields of ``LayerFactors``, with the shapes given there. The latent's rows are made
    orthonormal.
    """
    gain = plan.spec.attention_factor**2
    factors = LayerFactors(
        # A runtime applies yarn's gain through cos and sin, so only to the rotary part of the scores.
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
    """Return the conversion method called ``name``.

    Raises:
        TransmlaError: if there is no such method.
    """
    method: Method = lookup("transmla.core.methods", "METHOD", name, kind="method")
    return method
