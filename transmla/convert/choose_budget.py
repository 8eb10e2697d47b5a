"""Choose the smallest cache whose KL to the source the user accepts.

1. One pass over the calibration text measures what each size costs, in closed form (``layer_costs.py``).
2. From these costs follow the sizes of all layers for every total cache: one size for all layers where the format has
   one shape, otherwise the division that loses least (``plan.allocate``).
3. A trial converts all layers with the sizes that should just be accepted, fit included, writes nothing, and measures
   the KL on held-out text. The costs are scaled by what the trial found, and the choice is made again.

The KL of single layers does not add up, and a fit lowers it: both are part of what a trial measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from transmla.artifacts import Plan
from transmla.convert.held_rows import Rows
from transmla.convert.layer_costs import TINY, Costs, measure_costs
from transmla.convert.layers import LayerConverter
from transmla.convert.prepare import Prepared, plan_at, with_plan
from transmla.convert.streams import Streams
from transmla.errors import TransmlaError
from transmla.formats.base import format_named
from transmla.plan.allocate import Rung, falling_caches
from transmla.plan.estimate_time import TRIALS
from transmla.plan.shape_ladder import FINE_RATIOS, combined, ladder, may_keep_layers
from transmla.ranks import Ranks
from transmla.reporter import Reporter

# Share of the closed form's KL that a fit is expected to leave, before a trial has measured it. From SmolLM2-135M: full
# at 12 to 50 % of the cache (README.md), fast at 39 %.
LEFT_BY_FIT = {"off": 1.0, "fast": 0.48, "full": 0.28}
# The least that a fit may leave: a loss that even this does not reach is refused without a trial.
BEST_FIT = {"off": 1.0, "fast": 0.2, "full": 0.14}
# Share of the accepted KL that the choice aims at, because other text may lose more than the text that chose; and the
# share of this aim above which no other trial is needed. Three choices for two models lost 4 to 13 % more on
# WikiText-2 validation text than on the rows of the test split that they were made on.
AIM, CLOSE = 0.95, 0.93


@dataclass(frozen=True)
class Choice:
    """The cache that was chosen.

    Attributes:
        ratios: cache ratio whose shape a layer gets, for every layer; None for a layer that keeps its attention.
        expected: KL to the source in nats per token, as the trials let expect it on held-out text.
        trials: number of trials; 0 if none of them converted this choice, so that ``expected`` is an estimate.
    """

    ratios: tuple[float | None, ...]
    expected: float
    trials: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the saved progress."""
        return asdict(self)


@dataclass(frozen=True)
class _Option:
    """Sizes for all layers, and the KL of the closed form that the costs predict for them."""

    ratios: tuple[float | None, ...]
    predicted: float


def choose_budget(prepared: Prepared, rows: Rows, folder: Path | None, report: Reporter) -> Choice:
    """Choose the sizes of all layers for a recipe that gives the accepted KL.

    Args:
        prepared: the conversion.
        rows: the calibration mixture; ``checking`` is not read.
        folder: folder on the disk for hidden states; None keeps them in memory.
        report: receives the progress.

    Raises:
        TransmlaError: if even the largest cache loses more, or if a number overflows.
    """
    accepted = prepared.recipe.accepted_kl
    assert accepted is not None
    plans = ladder(partial(plan_at, prepared))
    by_layer = format_named(prepared.plan.format).shapes_by_layer
    costs = measure_costs(prepared, list(plans.values()), rows, report, by_layer=by_layer, folder=folder)
    # Layers that keep their attention come last where a runtime would be lost with them.
    shelves = [_uniform(prepared, plans, costs)]
    if by_layer:
        keeping = (True,) if may_keep_layers(prepared.plan) else (False, True)
        shelves = [_by_layer(prepared, plans, costs, keeping=keeps) for keeps in keeping]
    tried: dict[_Option, float] = {}
    fit = prepared.recipe.reconstruct
    for trial in range(1, TRIALS + 1):
        option = _smallest(shelves, AIM * accepted, tried, fit) or _smallest(shelves, accepted, tried, fit)
        if option is None and not tried and shelves[-1][0].predicted * BEST_FIT[fit] <= accepted:
            option = shelves[-1][0]
        if option is None or option in tried:
            break
        chosen = with_choice(prepared, Choice(option.ratios, 0.0, 0))
        name = f"trial {trial} of at most {TRIALS}"
        converter, streams = convert_unwritten(chosen, rows.calibration, rows.choosing, folder, report, name)
        measured = tried[option] = max(TINY, converter.divergence(streams))
        report.message(
            f"trial {trial}: {chosen.plan.model_cache_values:,} values per token, KL {measured:.4f} on held-out text"
            f" (accepted: {accepted:g})"
        )
        if CLOSE * AIM * accepted <= measured <= AIM * accepted:
            return Choice(option.ratios, measured, trial)
    option = _smallest(shelves, AIM * accepted, tried, fit) or _smallest(shelves, accepted, tried, fit)
    if option is None:
        reached = min(_corrected(option, tried, fit) for option in shelves[-1])
        raise _unreachable(prepared, accepted, reached, measured=bool(tried))
    return Choice(option.ratios, _corrected(option, tried, fit), len(tried) if option in tried else 0)


def with_choice(prepared: Prepared, choice: Choice) -> Prepared:
    """Return the conversion with the sizes that were chosen."""
    ratios = sorted({ratio for ratio in choice.ratios if ratio is not None}, reverse=True)
    plans = [plan_at(prepared, ratio) for ratio in ratios]
    plan = combined(plans, [None if ratio is None else ratios.index(ratio) for ratio in choice.ratios])
    note = (
        f"the cache is the smallest that is expected to keep the KL to the source at"
        f" {prepared.recipe.accepted_kl or 0:g} nats per token before healing, on text like the calibration mixture"
    )
    return with_plan(prepared, replace(plan, notes=(*plan.notes, note)))


def describe(prepared: Prepared, choice: Choice) -> list[str]:
    """Return what the user is told about a choice: the cache, its KL, and the widths of the layers."""
    plan, share = prepared.plan, prepared.plan.model_cache_ratio
    found = "measured" if choice.trials else "expected"
    lines = [f"chosen: {share:.1%} of the cache; KL to the source {found} on held-out text: {choice.expected:.4f}"]
    if plan.layer_shapes:
        widths = ["kept" if i in plan.kept else str(plan.at(i).shape.cache_values) for i in range(len(choice.ratios))]
        lines.append(f"cached values by layer: {', '.join(widths)}")
    return lines


def _smallest(
    shelves: Sequence[Sequence[_Option]], accepted: float, tried: Mapping[_Option, float], fit: str
) -> _Option | None:
    """Return the smallest cache whose KL is accepted, of the first of ``shelves`` that has one; None if none has.

    Args:
        shelves: lists of options with falling cache.
        accepted: largest KL.
        tried: KL of the options that were converted.
        fit: name of the fit.
    """
    for options in shelves:
        for option in reversed(options):
            if _corrected(option, tried, fit) <= accepted:
                return option
    return None


def _corrected(option: _Option, tried: Mapping[_Option, float], fit: str) -> float:
    """Return the KL of an option: as its trial measured it, or as predicted, times what the nearest trials found."""
    points = sorted((math.log(other.predicted), measured / other.predicted) for other, measured in tried.items())
    return option.predicted * (_interpolated(points, math.log(option.predicted)) if points else LEFT_BY_FIT[fit])


def _uniform(prepared: Prepared, plans: dict[float, Plan], costs: Costs) -> list[_Option]:
    """Return one option for each shape that all layers may share, with falling cache."""
    measured = [(plan.model_cache_values, cost) for plan, cost in zip(plans.values(), costs.totals, strict=True)]
    layers = prepared.plan.spec.num_hidden_layers
    ratios = sorted({*plans, *FINE_RATIOS}, reverse=True)
    fine = ladder(partial(plan_at, prepared), [ratio for ratio in ratios if min(plans) <= ratio <= max(plans)])
    points = [(-math.log(values), cost) for values, cost in measured]
    return [
        _Option((ratio,) * layers, _interpolated(points, -math.log(plan.model_cache_values)))
        for ratio, plan in fine.items()
    ]


def _by_layer(prepared: Prepared, plans: dict[float, Plan], costs: Costs, *, keeping: bool) -> list[_Option]:
    """Return the cheapest division of every total cache among the layers, with falling cache.

    ``keeping``: whether layers may keep their attention.
    """
    spec, names = prepared.plan.spec, list(plans)
    sizes: dict[int, list[tuple[float | None, Rung]]] = {}
    for i, layer in costs.layers.items():
        sizes[i] = [(None, Rung(spec.cache_values, 0.0))] if keeping else []
        for ratio, plan, cost in zip(names, plans.values(), layer, strict=True):
            values = plan.at(i).shape.cache_values
            if not sizes[i] or values < sizes[i][-1][1].values:
                sizes[i].append((ratio, Rung(values, cost)))
    sums = [max(TINY, sum(layer[k] for layer in costs.layers.values())) for k in range(len(names))]
    # How much more all layers lose together than their single losses add up to, by the size of this sum.
    excess = [(math.log(alone), together / alone) for alone, together in zip(sums, costs.totals, strict=True)]
    options = []
    for division in falling_caches([[rung for _, rung in layer] for layer in sizes.values()]):
        chosen = {i: layer[k] for (i, layer), k in zip(sizes.items(), division, strict=True)}
        ratios = tuple(chosen[i][0] if i in chosen else None for i in range(spec.num_hidden_layers))
        if any(ratio is not None for ratio in ratios):
            alone = max(TINY, sum(rung.cost for _, rung in chosen.values()))
            options.append(_Option(ratios, alone * _interpolated(excess, math.log(alone))))
    return options


def _interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return the value at ``x`` between points of rising x and positive values, linear in the values' logarithm."""
    if x <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if x <= right:
            share = (x - left) / max(right - left, 1e-12)
            return math.exp((1 - share) * math.log(low) + share * math.log(high))
    return points[-1][1]


def convert_unwritten(
    prepared: Prepared, calibration: Tensor, held: Tensor, folder: Path | None, report: Reporter, name: str
) -> tuple[LayerConverter, Streams]:
    """Convert all layers without writing them.

    Args:
        prepared: the conversion.
        calibration: token ids [N, T] that layers are converted on.
        held: held-out token ids [n, T].
        folder: folder on the disk for hidden states; None keeps them in memory.
        report: receives the progress.
        name: name of the stage.

    Returns:
        The converter, and the hidden states after the last layer.
    """
    source, converter = prepared.source, LayerConverter(prepared, Ranks(), folder)
    streams = converter.start(calibration, source.checkpoint.read(source.family.tensors["embed"]), held)
    report.stage(f"{name}, not written", source.spec.num_hidden_layers)
    for i in range(source.spec.num_hidden_layers):
        streams = converter.convert(i, streams).streams
        report.advance(i + 1)
    return converter, streams


def _unreachable(prepared: Prepared, accepted: float, reached: float, *, measured: bool) -> TransmlaError:
    """Return the refusal of a KL that the largest cache does not reach."""
    remedies = [f"--max-kl {reached * 1.1:.2g} or more"]
    # A fit needs a second sequence to evaluate on.
    if prepared.recipe.reconstruct != "full" and (prepared.recipe.calibration.sequences or 0) > 1:
        remedies.append("--reconstruct full")
    if not format_named(prepared.plan.format).shapes_by_layer:
        remedies.append("--format transmla, in which layers may keep their attention")
    return TransmlaError(
        f"no cache smaller than the source's keeps the KL at {accepted:g} nats per token",
        limit=f"the largest that saves anything {'loses' if measured else 'is expected to lose'} {reached:.3g}",
        remedy="pass " + ", or ".join(remedies),
    )
