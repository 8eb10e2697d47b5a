"""Checks of a loaded export, and the tools that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.modeling.transformers_api import CACHE_ARGUMENT

# Relative difference of logits or attention outputs that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Check:
    """One question, its answer, and the number behind it."""

    name: str
    passed: bool
    detail: str


def relative_difference(left: Tensor, right: Tensor) -> float:
    """‖left − right‖ / ‖right‖ in float64."""
    return float((left.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30))


@torch.no_grad()
def compare_decoding(name: str, model: Any, tokens: Tensor, expected: Tensor, prefill: int) -> Check:
    """Read ``prefill`` tokens of ``tokens`` [B, T] at once and the rest one by one; compare all logits.

    ``expected`` [B, T, V] are the logits of one full forward pass.
    """
    out = model(tokens[:, :prefill], use_cache=True)
    cache, pieces = out[CACHE_ARGUMENT], [out.logits]
    for i in range(prefill, tokens.shape[1]):
        pieces.append(model(tokens[:, i : i + 1], use_cache=True, **{CACHE_ARGUMENT: cache}).logits)
    difference = relative_difference(torch.cat(pieces, 1), expected)
    return Check(name, difference <= TOLERANCE[model.dtype], f"relative difference {difference:.1e}")


@torch.no_grad()
def observe_layers(model: Any, tokens: Tensor, module: Callable[[Any], Any]) -> list[tuple[Tensor, Tensor]]:
    """(input, output) of ``module(layer)`` in every layer, for one full forward pass over ``tokens`` [B, T]."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        seen.append((x, output[0] if isinstance(output, tuple) else output))

    hooks = [module(layer).register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        model(tokens, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return seen
