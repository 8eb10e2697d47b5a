"""Decide everything about a conversion before any weight is read, and refuse what cannot work."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from transmla.artifacts import AttentionSpec, LayerKind, MLAShape, Plan, RotaryPlan
from transmla.core.methods.base import Method, method_named
from transmla.errors import TransmlaError
from transmla.formats.base import Format, format_named, formats
from transmla.plan.freqfold import choose_fold
from transmla.plan.shape import choose_shape, export_dtype, full_rank
from transmla.recipe import Recipe

AUTO = "auto"
# Width of the rotary key in layers without rotary positions: one pair, the narrowest there is.
NO_ROTARY_WIDTH = 2


def make_plan(spec: AttentionSpec, recipe: Recipe, source_dtype: str, *, unfitted_because: str | None = None) -> Plan:
    """Decide format, shape, rotary slots and precision of a conversion.

    Every kind of layer caches as many values as the others, as far as it has anything to cache.

    Args:
        spec: the source's attention.
        recipe: with ``reconstruct`` decided (``off``, ``fast`` or ``full``), because a fitted layer gets other widths.
        source_dtype: the precision of the source's weights.
        unfitted_because: why layers are not fitted, for the note that says what this changes.

    Raises:
        TransmlaError: for a shape that is impossible, that the format cannot store, or that saves nothing.
    """
    method, kept = method_named(recipe.method), kept_layers(spec, recipe.layers)
    form, reason = choose_format(spec, recipe, kept)
    shape = choose_shape(spec, recipe, form)
    kinds = spec.kinds or (spec.kind(0),)
    planned = [_plan_kind(spec, kind, shape, form, method, recipe) for kind in kinds]
    # The plan's own shape is that of the kind with the most rotary channels.
    widest = max(range(len(kinds)), key=lambda i: kinds[i].turned)
    first, rotary, rope_parameters = planned[widest]
    notes = [] if reason is None else [f"format {form.name}: {reason}"]
    notes += _layer_notes(spec, kept)
    notes += form.notes(spec, first, rope_parameters)
    if unfitted_because is not None:
        notes += _shape_note(spec, recipe, form, shape, unfitted_because)
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
    """Choose the export format: the one asked for, or the preferred one that can store the source.

    ``kept`` layers keep the source's attention. Also returns why another format than the most preferred was taken.

    Raises:
        TransmlaError: if the format that was asked for cannot store the source, or cannot honour an option.
    """
    ranked = _ranked()
    reason: str | None = None
    if recipe.format == AUTO:
        form = best_format(spec, kept)
        if form is not ranked[0]:
            reason = f"the {ranked[0].name} format has no place for {ranked[0].lacks(spec, kept)}"
    else:
        form = format_named(recipe.format)
        gap = form.lacks(spec, kept)
        if gap is not None:
            raise TransmlaError(
                f"{spec.family}: {gap} cannot be carried by the {form.name} format",
                limit="it has no place for this",
                remedy="leave --format out" + (", or convert all layers" if kept else ""),
            )
        if form is not ranked[0]:
            lacking = ranked[0].lacks(spec, kept)
            reason = f"the {ranked[0].name} format has no place for {lacking}" if lacking else "it was asked for"
    for option in sorted(frozenset().union(*(other.options for other in ranked)) - form.options):
        if getattr(recipe, option):
            flag = f"--{option.replace('_', '-')}"
            takers = " or ".join(other.name for other in ranked if option in other.options)
            raise TransmlaError(
                f"{flag} needs the {takers} format",
                limit=f"this export is of the format {form.name}: {reason or 'it was asked for'}",
                remedy=f"drop {flag}",
            )
    return form, reason


def best_format(spec: AttentionSpec, kept: tuple[int, ...] = ()) -> Format:
    """The preferred format of those that can store the source."""
    return next(form for form in _ranked() if form.lacks(spec, kept) is None)


def _ranked() -> list[Format]:
    return sorted(formats().values(), key=lambda form: -form.preference)


def kept_layers(spec: AttentionSpec, chosen: str | None) -> tuple[int, ...]:
    """Return the layers that are not among those ``chosen``, such as "4-28" or "0-3,8"; none without a choice.

    Raises:
        TransmlaError: for layers that the model does not have, and for text that names no layers.
    """
    if chosen is None:
        return ()
    converted: set[int] = set()
    for part in chosen.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        layers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not layers or layers.stop > spec.num_hidden_layers:
            raise TransmlaError(
                f"--layers {chosen}: '{part}' names no layers",
                limit=f"the model has layers 0 to {spec.num_hidden_layers - 1}",
                remedy=f"such as --layers 1-{spec.num_hidden_layers - 1}, or 0-3,8",
            )
        converted |= set(layers)
    return tuple(i for i in range(spec.num_hidden_layers) if i not in converted)


def _plan_kind(
    spec: AttentionSpec, kind: LayerKind, shape: MLAShape, form: Format, method: Method, recipe: Recipe
) -> tuple[MLAShape, RotaryPlan, dict[str, Any]]:
    """Plan one kind of layer: its shape, its rotary slots, and the config's ``rope_parameters``."""
    if not kind.turned:
        # Without rotary positions the latent takes the whole budget, up to its full rank.
        full = full_rank(spec)
        rank = min(shape.cache_values - NO_ROTARY_WIDTH, full) if shape.cache_values < full else full
        still = replace(shape, kv_lora_rank=rank, qk_rope_head_dim=NO_ROTARY_WIDTH, latent_rank=rank)
        return still, RotaryPlan((0,), 1), dict(spec.rope_parameters)
    slots, rope_parameters = form.rotary(spec, kind, shape.qk_rope_head_dim, custom=recipe.custom_rope)
    return shape, RotaryPlan(slots, choose_fold(recipe, method, slots, kind.turned)), rope_parameters


def _layer_notes(spec: AttentionSpec, kept: tuple[int, ...]) -> list[str]:
    """Notes on layers that cache less, or keep their attention."""
    notes = []
    windows = [window for i in range(spec.num_hidden_layers) if (window := spec.kind(i).window) is not None]
    if windows:
        notes.append(
            f"{len(windows)} of {spec.num_hidden_layers} layers cache no more than {max(windows)} tokens back: what "
            "their conversion saves is bounded too"
        )
    if kept:
        notes.append(f"{len(kept)} of {spec.num_hidden_layers} layers keep the source's attention and cache")
    return notes


def _shape_note(spec: AttentionSpec, recipe: Recipe, form: Format, shape: MLAShape, because: str) -> list[str]:
    """Say which widths a fitted conversion would have, if they are others."""
    try:
        fitted = choose_shape(spec, recipe.model_copy(update={"reconstruct": "fast"}), form)
    except TransmlaError:
        return []
    if fitted == shape:
        return []
    return [
        f"layers are not fitted ({because}), so the rotary key is wider: latent {shape.kv_lora_rank} + rotary "
        f"{shape.qk_rope_head_dim}, where a fitted conversion has {fitted.kv_lora_rank} + {fitted.qk_rope_head_dim}"
    ]
