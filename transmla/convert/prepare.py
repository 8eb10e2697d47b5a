"""Decide everything about a conversion before a weight is read: ``plan``, ``inspect`` and ``convert`` share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from transmla.artifacts import Plan
from transmla.core.methods.base import method_named
from transmla.plan import estimate
from transmla.plan.fit_settings import FitSettings, choose_fit, fit_settings
from transmla.plan.make_plan import make_plan
from transmla.recipe import Recipe
from transmla.source.device import pick_device
from transmla.source.open_source import Source, open_source, runs_in_bfloat16


@dataclass(frozen=True)
class Prepared:
    """One conversion, decided.

    Attributes:
        recipe: as given, with ``reconstruct`` decided.
        source: opened and checked; no weight has been read.
        device: that converts.
        unfitted_because: why layers are not fitted; None if they are.
        fit: how every layer is fitted; None if it is not.
        plan: format, shape, rotary slots and precision.
    """

    recipe: Recipe
    source: Source
    device: torch.device
    unfitted_because: str | None
    fit: FitSettings | None
    plan: Plan


def prepare(recipe: Recipe, *, sequences: int | None = None) -> Prepared:
    """Open the recipe's source and decide device, fit and plan.

    ``sequences`` replaces the recipe's number of calibration sequences.

    Raises:
        TransmlaError: for a source, device, shape or option that cannot be converted.
    """
    source = open_source(recipe)
    device = pick_device(recipe.device)
    baseline = recipe.method if method_named(recipe.method).baseline else None
    name, because = choose_fit(recipe.reconstruct, device, sequences or recipe.calibration.sequences, baseline=baseline)
    return _decide(source, recipe.model_copy(update={"reconstruct": name}), device, because or None)


def with_cache_ratio(prepared: Prepared, ratio: float) -> Prepared:
    """Decide the same conversion again for another share of the source's cache; explicit widths are dropped.

    Raises:
        TransmlaError: if no shape fits.
    """
    widths = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank", "pad_for")
    recipe = prepared.recipe.model_copy(update=dict.fromkeys(widths) | {"cache_ratio": ratio})
    return _decide(prepared.source, recipe, prepared.device, prepared.unfitted_because)


def _decide(source: Source, recipe: Recipe, device: torch.device, unfitted_because: str | None) -> Prepared:
    plan = make_plan(source.spec, recipe, source.dtype, unfitted_because=unfitted_because)
    fit = fit_settings(recipe.reconstruct, plan.cache_ratio, experts=source.spec.experts)
    return Prepared(recipe, source, device, unfitted_because, fit, plan)


def summarise(prepared: Prepared) -> dict[str, Any]:
    """Return the plan and what the conversion needs, as plain values: what ``transmla plan`` shows."""
    source, recipe = prepared.source, prepared.recipe
    held = source.checkpoint.size if source.checkpoint.gguf else 0
    # On a CPU a half-precision source is widened to sample from, unless the CPU multiplies bfloat16.
    widened = 2 if source.dtype != "float32" and not runs_in_bfloat16(source, prepared.device) else 1
    sampled = source.checkpoint.size * widened if recipe.calibration.source == "self" else 0
    tokens = recipe.calibration.sequences * recipe.calibration.length
    return estimate.summary(
        prepared.plan,
        tokens,
        prepared.device,
        prepared.fit,
        reconstruct=recipe.reconstruct,
        held=held,
        sampled=sampled,
    )
