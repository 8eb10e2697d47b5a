"""Checks of a loaded export, and the helper functions that checks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.core.exact_float64 import ExactFloat64
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.load import accelerate

# Largest relative difference of logits or attention outputs that rounding can cause, by precision.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2}
# The same for weights that other software has changed, in any precision. A training without `transmla heal` can make
# native latents a thousand times larger: a tiny model after three steps of AdamW at 1e-3 had 2e-3 in float32.
CHANGED_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: the property that was checked.
        passed: whether the export has this property.
        detail: the measured number, as text.
    """

    name: str
    passed: bool
    detail: str


def relative_difference(left: Tensor, right: Tensor) -> float:
    """Return ‖left − right‖ / ‖right‖ in float64, for two tensors of the same shape."""
    return float((left.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30))


@torch.no_grad()
def compare_decoding(
    name: str, model: Any, tokens: Tensor, expected: Tensor, prefill: int, *, changed: bool = False
) -> Check:
    """Compare the logits of cached decoding with those of one full forward pass.

    Args:
        name: name of the check.
        model: the loaded export.
        tokens: a prompt [B, T].
        expected: logits [B, T, V] of one full forward pass.
        prefill: number of tokens in the prefill; the other tokens are decoded one by one.
        changed: whether other software has changed the weights.
    """
    out = model(tokens[:, :prefill], use_cache=True)
    cache, pieces = out[CACHE_ARGUMENT], [out.logits]
    for i in range(prefill, tokens.shape[1]):
        pieces.append(model(tokens[:, i : i + 1], use_cache=True, **{CACHE_ARGUMENT: cache}).logits)
    difference = relative_difference(torch.cat(pieces, 1), expected)
    limit = CHANGED_TOLERANCE if changed else TOLERANCE[model.dtype]
    return Check(name, difference <= limit, f"logits differ by {difference:.1e}, at most {limit:.0e} allowed")


@torch.no_grad()
def absorbed_decoding(model: Any, tokens: Tensor, *, changed: bool = False) -> Check:
    """Compare absorbed decoding of the last quarter of ``tokens`` [B, T] with a full forward pass of the model.

    The model stays accelerated afterwards.
    """
    implementation = model.config._attn_implementation

    def compare() -> Check:
        model.set_attn_implementation(implementation)
        expanded = model(tokens, use_cache=False).logits
        accelerate(model, backend="torch")
        prefill = 3 * tokens.shape[1] // 4
        return compare_decoding("absorbed = expanded", model, tokens, expanded, prefill, changed=changed)

    return beyond_rounding(model, compare)


def beyond_rounding(model: Any, compare: Callable[[], Check]) -> Check:
    """Return the result of a comparison; one that fails is judged by the same comparison in float64.

    Massive activations magnify rounding. Absorbed and expanded decoding of a right Qwen2.5-Coder-0.5B differ by 7e-6 or
    4e-4 in float32, depending on the tokens, by 6e-2 in bfloat16, and by at most 3e-14 in float64.

    Args:
        model: the loaded export; it has its precision again afterwards.
        compare: the comparison, which runs the model.
    """
    check, config = compare(), model.config
    if check.passed:
        return check
    # Tables of frequencies are buffers. They stay as they are, in float32: the signature is computed with them.
    precisions = [(parameter, parameter.dtype) for parameter in model.parameters()]
    experts = getattr(config, "_experts_implementation", None)
    config._experts_implementation = "eager"  # the others have no float64
    try:
        for parameter, _ in precisions:
            parameter.data = parameter.data.double()
        with ExactFloat64():
            check = compare()
    finally:
        for parameter, dtype in precisions:
            parameter.data = parameter.data.to(dtype)
        config._experts_implementation = experts
    return Check(check.name, check.passed, f"{check.detail} in float64")


@torch.no_grad()
def observe_layers(model: Any, tokens: Tensor, module: Callable[[Any], Any]) -> list[tuple[Tensor, Tensor]]:
    """Record the input and output of one submodule of every layer, during a full forward pass.

    Args:
        model: the loaded export.
        tokens: a prompt [B, T].
        module: returns the submodule of a given layer.

    Returns:
        For each layer the submodule's (input [B, T, …], output [B, T, …]).
    """
    observed: list[tuple[Tensor, Tensor]] = []

    def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        observed.append((x, output[0] if isinstance(output, tuple) else output))

    hooks = [module(layer).register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        model(tokens, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return observed
