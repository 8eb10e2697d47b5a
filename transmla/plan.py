"""Choosing the shape of the export before any weight is read, and refusing what cannot work."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from transmla.artifacts import AttentionSpec, MLAShape, Plan, RotaryPlan
from transmla.core.methods.common import Method
from transmla.errors import TransmlaError
from transmla.recipe import Recipe
from transmla.registry import lookup
from transmla.slots import choose_fold, choose_slots, native_slots, own_slots

DEFAULT_CACHE_RATIO = 0.5
RANK_MULTIPLE = 16
NATIVE, OWN = "native", "transmla"
# Rotary key of a layer that turns nothing: as narrow as a pair.
STILL_WIDTH = 2
# (kv_lora_rank, qk_rope_head_dim) with fast decode kernels and (nope, rope, v) with fast prefill ones,
# vLLM 0.24–0.33 on Hopper.
VLLM_DECODE = ((256, 64), (512, 64))
VLLM_PREFILL = ((64, 64, 128), (128, 64, 128), (192, 64, 256))


def method_named(name: str) -> Method:
    """The conversion method called ``name``."""
    method: Method = lookup("transmla.core.methods", "METHOD", name, kind="method")
    return method


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


def export_dtype(wanted: str, source: str) -> str:
    """bfloat16 or float32; half precision is not offered: it underflows in the latent norm, and factors overflow it."""
    if wanted != "auto":
        return wanted
    return "float32" if source == "float32" else "bfloat16"


def full_rank(spec: AttentionSpec) -> int:
    """Rank of the keys and values of all heads, as maps of what the attention reads."""
    return min(2 * spec.num_key_value_heads * spec.head_dim, spec.features)


def choose_shape(spec: AttentionSpec, recipe: Recipe, *, turned: int | None = None) -> MLAShape:
    """The widths asked for, or those that fit ``cache_ratio``.

    ``turned`` pairs of a head's channels turn, for an export that carries its own frequencies.
    """
    full = full_rank(spec)
    fixed = recipe.kv_lora_rank is not None or recipe.qk_rope_head_dim is not None
    if fixed and recipe.cache_ratio is not None:
        raise TransmlaError(
            "both a cache ratio and explicit widths were given",
            limit="--cache-ratio chooses kv_lora_rank and qk_rope_head_dim itself",
            remedy="give one or the other",
        )
    budget = int(spec.cache_values * (recipe.cache_ratio or DEFAULT_CACHE_RATIO))
    ratio = recipe.cache_ratio or DEFAULT_CACHE_RATIO
    d_r = recipe.qk_rope_head_dim or (
        64 if recipe.pad_for else _rotary_width(spec, ratio, budget, turned, fitted=recipe.reconstruct != "off")
    )
    rank = recipe.kv_lora_rank or (budget - d_r) // RANK_MULTIPLE * RANK_MULTIPLE
    if rank <= 0:
        raise TransmlaError(
            f"a cache of {budget} values per token and layer cannot hold a rotary key of {d_r}",
            limit=f"the latent needs at least {RANK_MULTIPLE} more",
            remedy=f"raise --cache-ratio to {(d_r + RANK_MULTIPLE) / spec.cache_values:.3f} or lower"
            " --qk-rope-head-dim",
        )
    if rank > full and not (recipe.pad_for or recipe.kv_lora_rank is None):
        raise TransmlaError(
            f"kv_lora_rank {rank} is larger than the full rank of the keys and values",
            limit=f"at most {full} = min(2 × {spec.num_key_value_heads} heads × {spec.head_dim}, hidden size)",
            remedy="lower --kv-lora-rank, or pass --pad-for vllm to pad with zeros",
        )
    d_n = recipe.qk_nope_head_dim or spec.head_dim
    d_v = recipe.v_head_dim or spec.head_dim
    latent_rank = min(rank, full)
    if recipe.pad_for == "vllm":
        rank, d_r, d_n, d_v = _vllm_shape(rank, d_r, d_n, d_v, by_budget=recipe.kv_lora_rank is None)
        latent_rank = min(rank, full)
    else:
        rank = latent_rank
    for name, width in (("qk_nope_head_dim", d_n), ("v_head_dim", d_v)):
        if width < spec.head_dim:
            raise TransmlaError(
                f"{name} {width} is smaller than the source's head width {spec.head_dim}",
                limit="these widths can be padded, not cut",
                remedy=f"use at least {spec.head_dim}",
            )
    if recipe.q_lora_rank is not None and recipe.q_lora_rank > spec.hidden_size:
        raise TransmlaError(
            f"q_lora_rank {recipe.q_lora_rank} is larger than the full rank of the queries",
            limit=f"at most {spec.hidden_size}, the hidden size",
            remedy="lower --q-lora-rank, or leave it out",
        )
    return MLAShape(rank, d_r, d_n, d_v, recipe.q_lora_rank, latent_rank)


def _rotary_width(spec: AttentionSpec, ratio: float, budget: int, turned: int | None, *, fitted: bool) -> int:
    """What turns of the source's head width, a half or a quarter of it; narrower only if nothing else fits.

    A fitted layer makes do with fewer rotary channels and has more use for a wide latent (SmolLM2-135M, error of
    single layers on validation text: 32 + 160 beats 64 + 128 by a third, 16 + 112 beats 32 + 96 by a tenth).
    """
    wide, middle = (1.0, 0.4) if fitted else (0.5, 0.2)
    widest = spec.head_dim if turned is None else 2 * turned
    width = widest // (1 if ratio >= wide else 2 if ratio >= middle else 4)
    while budget - width < RANK_MULTIPLE and width % 4 == 0:
        width //= 2
    # Some tables (yarn) exist at full width alone.
    while turned is None and width < spec.head_dim and native_slots(spec, width) is None:
        width *= 2
    return width


def _vllm_shape(rank: int, d_r: int, d_n: int, d_v: int, *, by_budget: bool) -> tuple[int, int, int, int]:
    ranks = [r for r, rope in VLLM_DECODE if rope == d_r]
    larger = [r for r in ranks if r >= rank]
    smaller = [r for r in ranks if r <= rank]
    heads = [(n, v) for n, rope, v in VLLM_PREFILL if rope == d_r and n >= d_n and v >= d_v]
    if not heads or not (larger or (smaller and by_budget)):
        raise TransmlaError(
            f"no fast vLLM kernel takes rank {rank}, rope {d_r}, nope {d_n}, value {d_v}",
            limit="decode takes 256+64 and 512+64, prefill heads of at most 192+64 and values of 256",
            remedy="set --qk-rope-head-dim 64, or drop --pad-for",
        )
    # A budget is kept when a kernel fits inside it; an explicit rank is never cut.
    chosen = max(smaller) if smaller and by_budget else min(larger)
    return chosen, d_r, *min(heads)


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
