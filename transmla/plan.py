"""Choosing the shape of the export before any weight is read, and refusing what cannot work."""

from __future__ import annotations

from typing import Any

import torch

from transmla.artifacts import AttentionSpec, MLAShape, Plan, RotaryPlan
from transmla.core.methods.common import Method
from transmla.core.rope import match_slots
from transmla.errors import TransmlaError
from transmla.native import custom_table, rotary_table
from transmla.recipe import Recipe
from transmla.registry import lookup

DEFAULT_CACHE_RATIO = 0.5
RANK_MULTIPLE = 16
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
    method = method_named(recipe.method)
    shape = choose_shape(spec, recipe)
    slots, rope_parameters = choose_slots(spec, shape.qk_rope_head_dim, custom=recipe.custom_rope)
    stride = max(1, len(spec.inv_freq) // len(set(slots)))
    repeated = len(set(slots)) < len(slots)
    preferred = 1 if repeated else method.freqfold(stride)
    if len(spec.inv_freq) % preferred:
        preferred = stride
    fold = recipe.freqfold or preferred
    check_fold(fold, stride, len(spec.inv_freq))
    plan = Plan(
        spec=spec,
        shape=shape,
        rotary=RotaryPlan(slots, fold),
        method=method.name,
        dtype=export_dtype(recipe.dtype, source_dtype),
        rope_parameters=rope_parameters,
        notes=tuple(_notes(spec, shape, rope_parameters)),
    )
    if plan.cache_ratio >= 1 and not recipe.allow_no_saving:
        raise TransmlaError(
            f"this shape caches {shape.cache_values} values per token and layer",
            limit=f"the source caches {spec.cache_values}, so nothing is saved",
            remedy="lower --cache-ratio or --kv-lora-rank, drop --pad-for, or pass --allow-no-saving",
        )
    return plan


def export_dtype(wanted: str, source: str) -> str:
    """bfloat16 or float32; half precision is not offered, it underflows in the latent norm."""
    if wanted != "auto":
        return wanted
    return "float32" if source == "float32" else "bfloat16"


def check_fold(fold: int, stride: int, pairs: int) -> None:
    """Every fold must hold a slot, and folds must tile the frequencies."""
    if fold % stride or pairs % fold:
        raise TransmlaError(
            f"freqfold {fold} does not fit the source's {pairs} rotary frequencies",
            limit=f"it must be a multiple of {stride} that divides {pairs}",
            remedy="choose another --freqfold, or leave it out",
        )


def choose_shape(spec: AttentionSpec, recipe: Recipe) -> MLAShape:
    """The widths asked for, or those that fit ``cache_ratio``."""
    full_rank = min(2 * spec.num_key_value_heads * spec.head_dim, spec.hidden_size)
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
        64 if recipe.pad_for else _rotary_width(spec, ratio, budget, fitted=recipe.reconstruct != "off")
    )
    rank = recipe.kv_lora_rank or (budget - d_r) // RANK_MULTIPLE * RANK_MULTIPLE
    if rank <= 0:
        raise TransmlaError(
            f"a cache of {budget} values per token and layer cannot hold a rotary key of {d_r}",
            limit=f"the latent needs at least {RANK_MULTIPLE} more",
            remedy=f"raise --cache-ratio to {(d_r + RANK_MULTIPLE) / spec.cache_values:.3f} or lower"
            " --qk-rope-head-dim",
        )
    if rank > full_rank and not (recipe.pad_for or recipe.kv_lora_rank is None):
        raise TransmlaError(
            f"kv_lora_rank {rank} is larger than the full rank of the keys and values",
            limit=f"at most {full_rank} = min(2 × {spec.num_key_value_heads} heads × {spec.head_dim}, hidden size)",
            remedy="lower --kv-lora-rank, or pass --pad-for vllm to pad with zeros",
        )
    d_n = recipe.qk_nope_head_dim or spec.head_dim
    d_v = recipe.v_head_dim or spec.head_dim
    latent_rank = min(rank, full_rank)
    if recipe.pad_for == "vllm":
        rank, d_r, d_n, d_v = _vllm_shape(rank, d_r, d_n, d_v, by_budget=recipe.kv_lora_rank is None)
        latent_rank = min(rank, full_rank)
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


def _rotary_width(spec: AttentionSpec, ratio: float, budget: int, *, fitted: bool) -> int:
    """The source's head width, a half or a quarter of it; narrower only if nothing else fits.

    A fitted layer makes do with fewer rotary channels and has more use for a wide latent (SmolLM2-135M, error of
    single layers on validation text: 32 + 160 beats 64 + 128 by a third, 16 + 112 beats 32 + 96 by a tenth).
    """
    wide, middle = (1.0, 0.4) if fitted else (0.5, 0.2)
    width = spec.head_dim // (1 if ratio >= wide else 2 if ratio >= middle else 4)
    while budget - width < RANK_MULTIPLE and width % 4 == 0:
        width //= 2
    # Some tables (yarn) exist at full width alone.
    while width < spec.head_dim and _slots(spec, width) is None:
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


def choose_slots(spec: AttentionSpec, width: int, *, custom: bool) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Source frequency of every rotary slot, and the ``rope_parameters`` that make the runtime agree.

    Raises:
        TransmlaError: if the runtime's table for this width is not a subset of the source's.
    """
    source = torch.tensor(spec.inv_freq, dtype=torch.float64)
    if width % 2:
        raise TransmlaError(
            f"qk_rope_head_dim {width} is odd",
            limit="rotary coordinates come in pairs",
            remedy=f"use an even divisor of {spec.head_dim}",
        )
    if custom and width > spec.head_dim and width % spec.head_dim == 0:
        slots = tuple(i for i in range(len(source)) for _ in range(width // spec.head_dim))
        return slots, custom_table(spec, source[list(slots)])
    found = _slots(spec, width)
    if found is None:
        rope_type = spec.rope_parameters.get("rope_type", "default")
        widths = [w for w in (spec.head_dim // k for k in (1, 2, 4, 8)) if w % 2 == 0]
        raise TransmlaError(
            f"qk_rope_head_dim {width} gives rotary frequencies the source does not have",
            limit=f"a runtime computes its own table; with rope_type '{rope_type}' and head width "
            f"{spec.head_dim} only {'the full width' if rope_type == 'yarn' else 'divisors'} match",
            remedy=f"use {spec.head_dim}" if rope_type == "yarn" else f"use one of {widths}",
        )
    return found, dict(spec.rope_parameters)


def _slots(spec: AttentionSpec, width: int) -> tuple[int, ...] | None:
    """Source frequency of every slot of the runtime's own table for ``width``, or None if they do not match."""
    table, factor = rotary_table(spec, width, spec.rope_parameters)
    if abs(factor - spec.attention_factor) > 1e-6:
        return None
    return match_slots(table, torch.tensor(spec.inv_freq, dtype=torch.float64))


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
