"""Decide everything about a conversion before any weight is read, and refuse conversions that cannot work."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from transmla.artifacts import AttentionSpec, LayerKind, MLAShape, Plan, RotaryPlan
from transmla.core.methods.base import Method, method_named
from transmla.errors import TransmlaError
from transmla.formats.base import Format, format_named, formats
from transmla.plan.freqfold import choose_fold
from transmla.plan.shape import choose_shape, export_dtype, full_rank, measures_slots
from transmla.recipe import Recipe

AUTO = "auto"
# Width of the rotary key in layers without rotary positions: one pair of channels, the minimum.
NO_ROTARY_WIDTH = 2
# Both parts of a cached row must be multiples of this for `kernels/hopper`, which loads 16 bytes at a time.
KERNEL_MULTIPLE = 8


def make_plan(spec: AttentionSpec, recipe: Recipe, source_dtype: str, *, unfitted_because: str | None = None) -> Plan:
    """Decide format, shape, rotary slots and precision of a conversion.

    All kinds of layer cache the same number of values per token. Layers without rotary positions are an exception:
    their latent is no wider than the full rank of their keys and values.

    Args:
        spec: the source's attention.
        recipe: the recipe; its ``reconstruct`` must be ``off``, ``fast`` or ``full``, because it changes the widths.
        source_dtype: precision of the source's weights, such as "bfloat16".
        unfitted_because: why layers are not fitted; adds a note on the widths that a fit would have.

    Raises:
        TransmlaError: if the shape is impossible, the format cannot store the source, or the cache does not shrink.
    """
    method, kept = method_named(recipe.method), kept_layers(spec, recipe.layers)
    form, reason = choose_format(spec, recipe, kept)
    shape = choose_shape(spec, recipe, form)
    kinds = spec.kinds or (spec.kind(0),)
    planned = [_plan_kind(spec, kind, shape, form, method, recipe) for kind in kinds]
    # ``Plan.shape`` is the shape of the kind with the most rotary channels.
    widest = max(range(len(kinds)), key=lambda i: kinds[i].rotary_pairs)
    first, rotary, rope_parameters = planned[widest]
    notes = [] if reason is None else [f"format {form.name}: {reason}"]
    notes += _layer_notes(spec, kept)
    notes += form.notes(spec, first, rope_parameters)
    if unfitted_because is not None:
        notes += _shape_note(spec, recipe, form, shape, unfitted_because)
    notes += _length_note(spec, recipe)
    notes += _kernel_notes(recipe, full_rank(spec))
    plan = Plan(
        spec=spec,
        shape=first,
        rotary=rotary,
        method=method.name,
        dtype=export_dtype(recipe.dtype, source_dtype),
        rope_parameters=rope_parameters,
        notes=tuple(notes),
        format=form.name,
        kinds=tuple((shape, rotary) for shape, rotary, _ in planned) if spec.kinds else (),
        kept=kept,
    )
    if plan.cache_ratio >= 1 and not recipe.allow_no_saving:
        raise TransmlaError(
            f"this shape caches {plan.shape.cache_values} values per token and layer",
            limit=f"the source caches {spec.cache_values}, so nothing is saved",
            remedy="lower --cache-ratio or --kv-lora-rank, drop --pad-for, or pass --allow-no-saving",
        )
    return plan


def choose_format(spec: AttentionSpec, recipe: Recipe, kept: tuple[int, ...]) -> tuple[Format, str | None]:
    """Choose the export format: the recipe's, or the most preferred one that can store the source.

    Args:
        spec: the source's attention.
        recipe: the recipe, whose options the format must support.
        kept: indices of the layers that keep the source's attention.

    Returns:
        The format, and the reason if it is not the most preferred one.

    Raises:
        TransmlaError: if the recipe's format cannot store the source, or the format does not support an option.
    """
    ranked = _ranked()
    reason: str | None = None
    if recipe.format == AUTO:
        form = best_format(spec, kept)
        if form is not ranked[0]:
            reason = f"the {ranked[0].name} format cannot store {ranked[0].lacks(spec, kept)}"
    else:
        form = format_named(recipe.format)
        gap = form.lacks(spec, kept)
        if gap is not None:
            raise TransmlaError(
                f"{spec.family}: the {form.name} format cannot store {gap}",
                remedy="leave --format out" + (", or convert all layers" if kept and not form.lacks(spec, ()) else ""),
            )
        if form is not ranked[0]:
            lacking = ranked[0].lacks(spec, kept)
            reason = f"the {ranked[0].name} format cannot store {lacking}" if lacking else "--format selects it"
    for option in sorted(frozenset().union(*(other.options for other in ranked)) - form.options):
        if getattr(recipe, option):
            flag = f"--{option.replace('_', '-')}"
            supporting = " or ".join(other.name for other in ranked if option in other.options)
            raise TransmlaError(
                f"{flag} needs the {supporting} format",
                limit=f"this export has the {form.name} format: {reason or '--format selects it'}",
                remedy=f"drop {flag}",
            )
    return form, reason


def best_format(spec: AttentionSpec, kept: tuple[int, ...] = ()) -> Format:
    """Return the most preferred format that can store the source; ``kept`` layers keep the source's attention."""
    return next(form for form in _ranked() if form.lacks(spec, kept) is None)


def _ranked() -> list[Format]:
    """Return all formats, most preferred first."""
    return sorted(formats().values(), key=lambda form: -form.preference)


def kept_layers(spec: AttentionSpec, chosen: str | None) -> tuple[int, ...]:
    """Return the indices of the layers that are not converted.

    Args:
        spec: the source's attention.
        chosen: layers to convert, such as "4-28" or "0-3,8"; None converts all layers.

    Raises:
        TransmlaError: if ``chosen`` names layers that the model does not have, or cannot be parsed.
    """
    if chosen is None:
        return ()
    converted: set[int] = set()
    for part in chosen.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        layers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        last = spec.num_hidden_layers - 1
        if not layers or layers.stop > last + 1:
            raise TransmlaError(
                f"--layers {chosen}: '{part}' names no layers",
                limit=f"the model has layers 0 to {last}",
                remedy=f"write for example --layers {last}, or 0-{last}" if last else "leave --layers out",
            )
        converted |= set(layers)
    return tuple(i for i in range(spec.num_hidden_layers) if i not in converted)


def _plan_kind(
    spec: AttentionSpec, kind: LayerKind, shape: MLAShape, form: Format, method: Method, recipe: Recipe
) -> tuple[MLAShape, RotaryPlan, dict[str, Any]]:
    """Plan one kind of layer: its shape, its rotary slots, and the config's ``rope_parameters``."""
    if not kind.rotary_pairs:
        # Without rotary positions the latent gets the whole cache budget, up to the full rank of keys and values.
        full = full_rank(spec)
        rank = min(shape.cache_values - NO_ROTARY_WIDTH, full) if shape.cache_values < full else full
        latent_only = replace(shape, kv_lora_rank=rank, qk_rope_head_dim=NO_ROTARY_WIDTH, latent_rank=rank)
        return latent_only, RotaryPlan((0,), 1), dict(spec.rope_parameters)
    slots, rope_parameters = form.rotary(spec, kind, shape.qk_rope_head_dim, custom=recipe.custom_rope)
    measured = measures_slots(spec, recipe) and len(slots) < kind.rotary_pairs
    fold = choose_fold(recipe, method, slots, kind.rotary_pairs)
    return shape, RotaryPlan(slots, fold, measured), rope_parameters


def _layer_notes(spec: AttentionSpec, kept: tuple[int, ...]) -> list[str]:
    """Return notes on layers with sliding windows, and on layers that keep the source's attention."""
    notes = []
    windows = [window for i in range(spec.num_hidden_layers) if (window := spec.kind(i).window) is not None]
    if windows:
        notes.append(
            f"{len(windows)} of {spec.num_hidden_layers} layers cache at most the last {max(windows)} tokens, so long "
            "contexts save no more in these layers"
        )
    if kept:
        notes.append(f"{len(kept)} of {spec.num_hidden_layers} layers keep the source's attention and cache")
    return notes


def _length_note(spec: AttentionSpec, recipe: Recipe) -> list[str]:
    """Return a note if the calibration text, whose length is resolved, is shorter than the source's context."""
    length, context = recipe.calibration.length, spec.max_position_embeddings
    if length is None or length >= context:
        return []
    return [
        f"calibrated on {length:,} tokens at a time, and the source reads up to {context:,}: quality falls at longer "
        "distances (eval --retrieval measures it, --calibration-length changes it)"
    ]


def _kernel_notes(recipe: Recipe, full: int) -> list[str]:
    """Return a note for each width of the recipe that the fastest kernels do not read; ``full`` is the full rank."""
    notes = []
    for name, largest in (("kv_lora_rank", full), ("qk_rope_head_dim", None)):
        width = getattr(recipe, name)
        if width is not None and width % KERNEL_MULTIPLE and not recipe.pad_for:
            below = width // KERNEL_MULTIPLE * KERNEL_MULTIPLE
            near = [w for w in (below, below + KERNEL_MULTIPLE) if w and (largest is None or w <= largest)]
            remedy = f"; {' and '.join(map(str, near))} would be read" if near else ""
            notes.append(
                f"{name} {width} is no multiple of {KERNEL_MULTIPLE}, so the kernel for Hopper GPUs does not read the"
                f" cache, and slower ones do{remedy}"
            )
    return notes


def _shape_note(spec: AttentionSpec, recipe: Recipe, form: Format, shape: MLAShape, because: str) -> list[str]:
    """Return a note on the widths that a fitted conversion would have, if they differ."""
    try:
        fitted = choose_shape(spec, recipe.model_copy(update={"reconstruct": "fast"}), form)
    except TransmlaError:
        return []
    if fitted == shape:
        return []
    return [
        f"layers are not fitted ({because}), so the rotary key is wider: latent {shape.kv_lora_rank} + rotary "
        f"{shape.qk_rope_head_dim} instead of {fitted.kv_lora_rank} + {fitted.qk_rope_head_dim}"
    ]
