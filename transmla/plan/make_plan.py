"""Choosing the shape of the export before any weight is read, and refusing what cannot work."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from transmla.artifacts import AttentionSpec, MLAShape, Plan, RotaryPlan
from transmla.core.methods.base import Method, method_named
from transmla.errors import TransmlaError
from transmla.formats.base import NATIVE, OWN
from transmla.plan.rotary_slots import choose_fold, choose_slots, own_slots
from transmla.plan.shape import choose_shape, export_dtype, full_rank
from transmla.recipe import Recipe

# Rotary key of a layer that turns nothing: as narrow as a pair.
STILL_WIDTH = 2


def make_plan(spec: AttentionSpec, recipe: Recipe, source_dtype: str) -> Plan:
    """Decide shape, rotary slots and precision of a conversion.

    Raises:
        TransmlaError: for a shape that is impossible, not native, or saves nothing.
    """
    method, kept = method_named(recipe.method), kept_layers(spec, recipe.layers)
    chosen = choose_format(spec, recipe, kept)
    if chosen == OWN:
        plan = _own_plan(spec, recipe, method, kept, source_dtype)
    else:
        shape = choose_shape(spec, recipe)
        slots, rope_parameters = choose_slots(spec, shape.qk_rope_head_dim, custom=recipe.custom_rope)
        plan = Plan(
            spec=spec,
            shape=shape,
            rotary=RotaryPlan(slots, choose_fold(recipe, method, slots, len(spec.inv_freq))),
            method=method.name,
            dtype=export_dtype(recipe.dtype, source_dtype),
            rope_parameters=rope_parameters,
            notes=tuple(_notes(spec, shape, rope_parameters)),
        )
    if plan.cache_ratio >= 1 and not recipe.allow_no_saving:
        raise TransmlaError(
            f"this shape caches {plan.shape.cache_values} values per token and layer",
            limit=f"the source caches {spec.cache_values}, so nothing is saved",
            remedy="lower --cache-ratio or --kv-lora-rank, drop --pad-for, or pass --allow-no-saving",
        )
    return plan


def choose_format(spec: AttentionSpec, recipe: Recipe, kept: tuple[int, ...]) -> str:
    """Native where it can say what the source does, or as the recipe says; ``kept`` layers stay as they are.

    Raises:
        TransmlaError: for what one of the formats cannot do.
    """
    if recipe.format == NATIVE and spec.native_gap:
        raise TransmlaError(
            f"{spec.family}: {spec.native_gap} cannot be carried by the native format",
            limit="DeepSeek-V3 has no place for it",
            remedy="leave --format out, or pass --format transmla",
        )
    if recipe.format == NATIVE and kept:
        raise TransmlaError(
            "--layers keeps the source's attention in some layers",
            limit="the native format has one attention for all",
            remedy="leave --format out, or convert all layers",
        )
    own = recipe.format == OWN or (recipe.format == "auto" and bool(spec.native_gap or kept))
    if own:
        flags = {"--pad-for": recipe.pad_for, "--q-lora-rank": recipe.q_lora_rank, "--custom-rope": recipe.custom_rope}
        for flag, given in flags.items():
            if given:
                raise TransmlaError(
                    f"{flag} needs the native format",
                    limit=f"this export is of the format transmla: {_reason(spec, kept)}",
                    remedy=f"drop {flag}",
                )
    return OWN if own else NATIVE


def _reason(spec: AttentionSpec, kept: tuple[int, ...]) -> str:
    """Why an export is not native."""
    if spec.native_gap:
        return f"DeepSeek-V3's has no place for {spec.native_gap}"
    return "DeepSeek-V3's has one attention for all layers" if kept else "it was asked for"


def kept_layers(spec: AttentionSpec, chosen: str | None) -> tuple[int, ...]:
    """The layers that are not among those ``chosen``, such as "4-28" or "0-3,8"; none without a choice.

    Raises:
        TransmlaError: for layers that there are not, and for words that are no layers.
    """
    if chosen is None:
        return ()
    wanted: set[int] = set()
    for part in chosen.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not found or found.stop > spec.num_hidden_layers:
            raise TransmlaError(
                f"--layers {chosen}: '{part}' names no layers",
                limit=f"the model has layers 0 to {spec.num_hidden_layers - 1}",
                remedy=f"such as --layers 1-{spec.num_hidden_layers - 1}, or 0-3,8",
            )
        wanted |= set(found)
    return tuple(i for i in range(spec.num_hidden_layers) if i not in wanted)


def _own_plan(spec: AttentionSpec, recipe: Recipe, method: Method, kept: tuple[int, ...], source_dtype: str) -> Plan:
    """Every kind of layer caches as much as the others, as far as it has anything to cache."""
    kinds = spec.kinds or (spec.kind(0),)
    widest = max(kind.turned for kind in kinds)
    shape = choose_shape(spec, recipe, turned=widest)
    made = []
    for kind in kinds:
        if kind.turned:
            slots = own_slots(kind, shape.qk_rope_head_dim)
            rotary = RotaryPlan(slots, choose_fold(recipe, method, slots, kind.turned))
            made.append((shape, rotary))
        else:
            full = full_rank(spec)
            rank = min(shape.cache_values - STILL_WIDTH, full) if shape.cache_values < full else full
            still = replace(shape, kv_lora_rank=rank, qk_rope_head_dim=STILL_WIDTH, latent_rank=rank)
            made.append((still, RotaryPlan((0,), 1)))
    first = next(i for i, kind in enumerate(kinds) if kind.turned == widest)
    notes = [f"format transmla: {_reason(spec, kept)}"]
    windows = [window for i in range(spec.num_hidden_layers) if (window := spec.kind(i).window) is not None]
    if windows:
        notes.append(
            f"{len(windows)} of {spec.num_hidden_layers} layers cache no more than {max(windows)} tokens back: what "
            "their conversion saves is bounded too"
        )
    if kept:
        notes.append(f"{len(kept)} of {spec.num_hidden_layers} layers keep the source's attention and cache")
    return Plan(
        spec=spec,
        shape=made[first][0],
        rotary=made[first][1],
        method=method.name,
        dtype=export_dtype(recipe.dtype, source_dtype),
        rope_parameters=dict(spec.rope_parameters),
        notes=tuple(notes),
        format=OWN,
        kinds=tuple(made) if spec.kinds else (),
        kept=kept,
    )


def _notes(spec: AttentionSpec, shape: MLAShape, rope_parameters: dict[str, Any]) -> list[str]:
    notes = []
    if spec.num_key_value_heads > 1 and rope_parameters.get("rope_type") != "longrope":
        notes.append(
            f"a native rotary table holds each frequency once, so the keys of {spec.num_key_value_heads} heads "
            "share one rotary key: even with nothing cut the conversion is not exact"
        )
    if shape.latent_rank < shape.kv_lora_rank:
        notes.append(
            f"{shape.kv_lora_rank - shape.latent_rank} of {shape.kv_lora_rank} latent channels are zero padding"
        )
    if rope_parameters.get("rope_type", "default") != "default":
        notes.append(f"rope_type '{rope_parameters['rope_type']}' in a DeepSeek-V3 config is read by transformers only")
    if spec.rms_norm_eps != 1e-6:
        notes.append(
            f"rms_norm_eps changes from {spec.rms_norm_eps:g} to 1e-06; norm weights are corrected by calibration"
        )
    return notes
