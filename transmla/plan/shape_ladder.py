"""The shapes that a conversion may choose from when the user gives a loss instead of a size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from transmla.artifacts import Plan
from transmla.errors import TransmlaError
from transmla.formats.base import format_named

# Shares of the source's cache whose shapes are measured, largest first. Equal steps of the logarithm, nearly.
RATIOS = (0.9, 0.75, 0.62, 0.5, 0.42, 0.34, 0.28, 0.22, 0.17, 0.125)
# Shares between these, for formats that have one shape in all layers.
FINE_RATIOS = tuple(i / 64 for i in range(58, 7, -1))


def ladder(plan_at: Callable[[float], Plan], ratios: Sequence[float] = RATIOS) -> dict[float, Plan]:
    """Return the plans of all distinct shapes at ``ratios`` by ratio, with falling cache.

    Args:
        plan_at: returns the plan for a share of the source's cache; raises if there is none.
        ratios: shares of the source's cache, falling.

    Raises:
        TransmlaError: if no share has a shape.
    """
    plans: dict[float, Plan] = {}
    smallest = math.inf
    problem: TransmlaError | None = None
    for ratio in ratios:
        try:
            plan = plan_at(ratio)
        except TransmlaError as error:
            problem = error
            continue
        if plan.model_cache_values < smallest:
            plans[ratio], smallest = plan, plan.model_cache_values
    if not plans:
        raise problem or TransmlaError("no share of the cache has a shape")
    return plans


def combined(plans: Sequence[Plan], choice: Sequence[int | None]) -> Plan:
    """Return the plan whose layer i has the shape of ``plans[choice[i]]``, or keeps its attention for None.

    Args:
        plans: plans of one source that differ in their shapes only, with falling cache.
        choice: one entry for each layer; those of layers that no plan converts are not read.
    """
    kept = tuple(i for i, rung in enumerate(choice) if rung is None or i in plans[0].kept)
    rungs = {rung for i, rung in enumerate(choice) if i not in kept and rung is not None}
    if not rungs or (len(rungs) == 1 and kept == plans[0].kept):
        return replace(plans[min(rungs, default=0)], kept=kept)
    widest = plans[min(rungs)]
    layers = [widest.at(i) if i in kept else plans[rung or 0].at(i) for i, rung in enumerate(choice)]
    notes = [note for note in widest.notes if "keep the source's attention" not in note]
    if kept:
        notes.append(f"{len(kept)} of {len(choice)} layers keep the source's attention and cache")
    shapes = tuple((layer.shape, layer.rotary) for layer in layers)
    return replace(widest, layer_shapes=shapes, kept=kept, notes=tuple(notes))


def may_keep_layers(plan: Plan) -> bool:
    """Return whether a layer may keep its attention without losing a runtime that would take the export."""
    form = format_named(plan.format)
    kept = (*plan.kept, next(i for i in range(plan.spec.num_hidden_layers) if i not in plan.kept))
    if form.lacks(plan.spec, kept) is not None or len(kept) == plan.spec.num_hidden_layers:
        return False
    before, after = (form.runtimes(candidate) for candidate in (plan, replace(plan, kept=kept)))
    return [runtime.accepts for runtime in before] == [runtime.accepts for runtime in after]
