"""Decide everything about a conversion before a weight is read, for ``plan``, ``inspect`` and ``convert`` alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from transmla.artifacts import AttentionSpec, Plan
from transmla.convert.calibration_text import longest_sequence, why_unsampled
from transmla.core.methods.base import method_named
from transmla.errors import TransmlaError
from transmla.formats.base import format_named
from transmla.plan import estimate
from transmla.plan.estimate_time import Rates, choosing_seconds, conversion_seconds, measure_rates
from transmla.plan.fit_settings import FITS, FitSettings, choose_fit, fit_settings
from transmla.plan.make_plan import AUTO as AUTO_FORMAT
from transmla.plan.make_plan import make_plan
from transmla.plan.shape_ladder import ladder
from transmla.ranks import local_size
from transmla.recipe import Recipe
from transmla.shares import shares
from transmla.source.device import pick_device
from transmla.source.open_source import Source, open_source, runs_in_bfloat16
from transmla.source.text import AUTO, SELF


@dataclass(frozen=True)
class Prepared:
    """All decisions about one conversion.

    Attributes:
        recipe: the recipe, with ``reconstruct`` resolved to ``off``, ``fast`` or ``full``, and with the amount of
            calibration text chosen.
        source: the opened and checked source, whose weights have not been read.
        device: the device that converts.
        unfitted_because: why layers are not fitted; None if they are fitted.
        fit: settings of the fit; None if layers are not fitted.
        plan: format, shape, rotary slots and precision.
        processes: number of processes on this computer that share the work.
    """

    recipe: Recipe
    source: Source
    device: torch.device
    unfitted_because: str | None
    fit: FitSettings | None
    plan: Plan
    processes: int = 1


# Sequences and tokens per sequence of the calibration text by device, if the recipe does not say. A layer serves the
# distances that it was calibrated on: docs/how-the-fit-was-found.md, "Long sequences". Shorter contexts get more
# sequences.
AMOUNTS = {"cuda": (64, 8192), "cpu": (64, 512)}
# Most tokens per sequence of sources with a softcap, whose fit holds all scores of a sequence.
SOFTCAP_LENGTH = 4096
# Share of a GPU's memory that the fit may need by its estimate, and the tokens per sequence that are not halved for it.
FIT_SHARE, SHORTEST = 0.8, 1024


def prepare(
    recipe: Recipe, *, sequences: int | None = None, weights: bool = True, processes: int | None = None
) -> Prepared:
    """Open the recipe's source, and choose device, fit and plan.

    Args:
        recipe: the recipe of the conversion.
        sequences: number of calibration sequences; None uses the recipe's.
        weights: whether the source's weights will be read; without, nothing is downloaded or unpacked but headers.
        processes: number of processes on this computer that share the work; None: those of this launch.

    Raises:
        TransmlaError: if the source cannot be converted, the device cannot be used, or an option or shape is invalid.
    """
    if recipe.format != AUTO_FORMAT:
        format_named(recipe.format)  # refuses a misspelt format before anything is downloaded
    if recipe.accepted_kl is not None and method_named(recipe.method).first_pass is not None:
        raise TransmlaError(
            f"--cache-ratio auto was given with method {recipe.method}",
            limit="the cost of a layer is measured for methods with one pass over the text",
            remedy="give a ratio, or leave --method out",
        )
    device = pick_device(recipe.device)  # before a model is downloaded
    source = open_source(recipe, weights=weights)
    recipe = _with_amounts(recipe, source.spec, device)
    baseline = recipe.method if method_named(recipe.method).baseline else None
    sequences = sequences or recipe.calibration.sequences or 0
    name, because = choose_fit(recipe.reconstruct, device, sequences, baseline=baseline)
    recipe = recipe.model_copy(update={"reconstruct": name})
    return replace(_decide(source, recipe, device, because or None), processes=processes or local_size())


def _with_amounts(recipe: Recipe, spec: AttentionSpec, device: torch.device) -> Recipe:
    """Return the recipe with sequences and length of the calibration text chosen, within the source's context."""
    calibration = recipe.calibration
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    sequences, most = default_amounts(spec, memory)
    length = calibration.length or most
    # Shorter sequences than the default's are more.
    chosen = {"sequences": calibration.sequences or max(sequences, sequences * most // length), "length": length}
    return recipe.model_copy(update={"calibration": calibration.model_copy(update=chosen)})


def default_amounts(spec: AttentionSpec, memory: int | None) -> tuple[int, int]:
    """Return the sequences of the calibration text and their tokens, if the recipe does not say.

    Args:
        spec: the source's attention.
        memory: the GPU's memory in bytes; None for a CPU.
    """
    sequences, most = AMOUNTS["cpu" if memory is None else "cuda"]
    softcap = any(kind.softcap is not None for kind in spec.kinds)
    length = min(most, longest_sequence(spec), SOFTCAP_LENGTH if softcap else most)
    sequences = max(sequences, sequences * most // length)
    while memory is not None and length >= 2 * SHORTEST:
        if estimate.fit_bytes(spec, sequences, length, FITS["full"]) <= FIT_SHARE * memory:
            break
        length //= 2
    return sequences, length


def with_cache_ratio(prepared: Prepared, ratio: float) -> Prepared:
    """Plan the same conversion with another cache ratio; explicit widths of the recipe are ignored.

    Args:
        prepared: the conversion.
        ratio: share of the source's cache that the export keeps.

    Raises:
        TransmlaError: if no shape fits.
    """
    widths = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank", "pad_for")
    recipe = prepared.recipe.model_copy(update=dict.fromkeys(widths) | {"cache_ratio": ratio})
    decided = _decide(prepared.source, recipe, prepared.device, prepared.unfitted_because)
    return replace(decided, processes=prepared.processes)


def _decide(source: Source, recipe: Recipe, device: torch.device, unfitted_because: str | None) -> Prepared:
    """Make the plan and choose the fit's settings, for a recipe with ``reconstruct`` resolved.

    For a recipe that gives a loss instead of a size, the plan is the largest that may be chosen.
    """
    prepared = Prepared(recipe, source, device, unfitted_because, None, None)  # type: ignore[arg-type]
    if recipe.accepted_kl is None:
        return with_plan(prepared, make_plan(source.spec, recipe, source.dtype, unfitted_because=unfitted_because))
    plans = list(ladder(partial(plan_at, prepared)).values())
    smallest, largest = (plans[i].model_cache_values / plans[0].spec.num_hidden_layers for i in (-1, 0))
    note = (
        "the cache is chosen while converting: the smallest that should keep the KL to the source at"
        f" {recipe.accepted_kl:g} nats per token before healing. Between {smallest:.0f} and {largest:.0f} values per"
        " token and layer may be cached; the widths in this output are the largest"
    )
    return with_plan(prepared, replace(plans[0], notes=(*plans[0].notes, note)))


def plan_at(prepared: Prepared, ratio: float) -> Plan:
    """Return the plan of the same conversion at a cache ratio; widths outside the cache remain the recipe's.

    Raises:
        TransmlaError: if no shape fits.
    """
    source, recipe = prepared.source, prepared.recipe.model_copy(update={"cache_ratio": ratio})
    return make_plan(source.spec, recipe, source.dtype, unfitted_because=prepared.unfitted_because)


def with_plan(prepared: Prepared, plan: Plan) -> Prepared:
    """Return the same conversion with another ``plan``, and with the fit that belongs to its cache."""
    spec, name = plan.spec, prepared.recipe.reconstruct
    fit = fit_settings(name, plan.cache_ratio, layer_parameters=spec.layer_parameters, experts=bool(spec.experts))
    return replace(prepared, plan=plan, fit=fit)


def rates_of(prepared: Prepared) -> Rates:
    """Measure the rates of the device that converts, in the precision that the source runs in."""
    half = runs_in_bfloat16(prepared.source, prepared.device)
    return measure_rates(prepared.device, torch.bfloat16 if half else torch.float32)


def process_bytes(prepared: Prepared) -> int:
    """Return the peak memory of one process on the device that converts, in bytes.

    On a GPU, this is the GPU's memory, without the hidden states between layers.
    """
    calibration = prepared.recipe.calibration
    sequences, length = calibration.sequences or 0, calibration.length or 0
    if prepared.device.type == "cuda":
        return estimate.device_bytes(prepared.plan, sequences, length, prepared.fit)
    return estimate.memory_bytes(prepared.plan, sequences * length, prepared.fit, prepared.device)


def summarise(prepared: Prepared, rates: Rates | None = None) -> dict[str, Any]:
    """Return the plan and the estimated cost of the conversion as plain values, for ``transmla plan``.

    Args:
        prepared: the conversion.
        rates: rates of its device; None measures them.
    """
    source, recipe = prepared.source, prepared.recipe
    # To sample from a half-precision source, a CPU without fast bfloat16 loads the model in float32.
    widened = 2 if source.dtype != "float32" and not runs_in_bfloat16(source, prepared.device) else 1
    calibration = recipe.calibration
    samples = {SELF, AUTO} & set(shares(calibration.source))
    unsampled = why_unsampled(source, prepared.device) if samples else ""
    sampled = source.checkpoint.size * widened if samples and not unsampled else 0
    amount = calibration.sequences or 0, calibration.length or 0
    summary = estimate.summary(
        prepared.plan,
        math.prod(amount),
        prepared.fit,
        device=prepared.device,
        reconstruct=recipe.reconstruct,
        sampled=sampled,
        processes=prepared.processes,
    )
    rates = rates or rates_of(prepared)
    seconds = conversion_seconds(prepared.plan, *amount, prepared.fit, rates, prepared.processes)
    choosing = None
    if recipe.accepted_kl is not None:
        closed, fitted = (conversion_seconds(prepared.plan, *amount, fit, rates) for fit in (None, prepared.fit))
        choosing = choosing_seconds(closed, fitted)
    also = {"device": str(prepared.device), "unsampled": unsampled, "choosing_seconds": choosing}
    return summary | {"seconds": seconds, **also}
