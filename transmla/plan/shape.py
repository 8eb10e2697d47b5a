"""Choose the widths of an export from the cache ratio or from explicit settings."""

from __future__ import annotations

import math

from transmla.artifacts import AttentionSpec, MLAShape
from transmla.core.methods.base import method_named
from transmla.errors import TransmlaError
from transmla.formats.base import Format
from transmla.formats.runtimes import VLLM_DECODE, VLLM_PREFILL
from transmla.recipe import Recipe

# Share of the source's cache that the export keeps if the recipe gives neither a ratio nor widths.
DEFAULT_CACHE_RATIO = 0.5
# Width of the rotary key in vLLM's kernels.
VLLM_ROTARY = 64
# A ``kv_lora_rank`` that is chosen from the cache budget is a multiple of this number of channels.
RANK_MULTIPLE = 16
# Largest share of a fitted export's cache that the rotary key takes, down to a quarter of a head's rotary channels. A
# quarter of the cache was too much for Qwen2.5-Coder-0.5B; SmolLM2-135M lost as much at a sixth as at a twelfth.
LARGEST_ROTARY_SHARE = 1 / 6


def export_dtype(requested: str, source: str) -> str:
    """Return the export's precision, "bfloat16" or "float32", for the recipe's ``requested`` and the ``source``'s.

    float16 is not supported: latent norms underflow in float16, and factors overflow.
    """
    if requested != "auto":
        return requested
    return "float32" if source == "float32" else "bfloat16"


def full_rank(spec: AttentionSpec) -> int:
    """Return the full rank of keys and values together: min(2·G·d, F) for G heads of width d and F features."""
    return min(2 * spec.num_key_value_heads * spec.head_dim, spec.features)


def measures_slots(spec: AttentionSpec, recipe: Recipe) -> bool:
    """Return whether the conversion chooses the rotary slots of each layer from statistics.

    It does so for normed queries and keys, whose exports store any frequencies, unless the recipe sets ``freqfold``.
    """
    return spec.normed and method_named(recipe.method).chooses_slots and recipe.freqfold is None


def choose_shape(spec: AttentionSpec, recipe: Recipe, form: Format) -> MLAShape:
    """Choose the widths of an export: the recipe's explicit widths, or widths that fit its ``cache_ratio``.

    Args:
        spec: the source's attention.
        recipe: the recipe, with ``reconstruct`` decided.
        form: the export's format.

    Raises:
        TransmlaError: if widths contradict each other, exceed a full rank, or do not fit the cache budget.
    """
    full = full_rank(spec)
    fixed = recipe.kv_lora_rank is not None or recipe.qk_rope_head_dim is not None
    if fixed and recipe.cache_ratio is not None:
        raise TransmlaError(
            "both a cache ratio and explicit widths were given",
            limit="--cache-ratio chooses kv_lora_rank and qk_rope_head_dim",
            remedy="give one or the other",
        )
    if recipe.pad_for and not (form.padded_by_runtimes or recipe.custom_rope or form.holds_rotary(spec, VLLM_ROTARY)):
        raise TransmlaError(
            "no fast vLLM kernel takes a rotary key of this source",
            limit=f"the kernels take a width of {VLLM_ROTARY}, with which the {form.name} format cannot store the "
            "source's frequencies",
            remedy="drop --pad-for",
        )
    given = recipe.cache_ratio
    ratio = DEFAULT_CACHE_RATIO if given is None or isinstance(given, str) else given
    budget = int(spec.cache_values * ratio)
    d_r = recipe.qk_rope_head_dim or (
        VLLM_ROTARY if recipe.pad_for else _rotary_width(spec, ratio, budget, form, recipe)
    )
    rank = recipe.kv_lora_rank or (budget - d_r) // RANK_MULTIPLE * RANK_MULTIPLE
    if rank <= 0:
        least = math.ceil(1000 * (d_r + RANK_MULTIPLE) / spec.cache_values) / 1000
        raise TransmlaError(
            f"a cache of {budget} values per token and layer cannot hold a rotary key of {d_r}",
            limit=f"the latent needs at least {RANK_MULTIPLE} values more",
            remedy="lower --qk-rope-head-dim, or give --kv-lora-rank too"
            if recipe.qk_rope_head_dim
            else f"raise --cache-ratio to {least:g}" + (", or drop --pad-for" if recipe.pad_for else ""),
        )
    if rank > full and not (recipe.pad_for or recipe.kv_lora_rank is None):
        raise TransmlaError(
            f"kv_lora_rank {rank} is larger than the full rank of the keys and values",
            limit=f"at most {full} = min(2 × {spec.num_key_value_heads} heads × {spec.head_dim}, hidden size)",
            remedy="lower --kv-lora-rank"
            + (", or pass --pad-for vllm to pad with zeros" if _can_be_padded(spec, recipe, form) else ""),
        )
    d_n = recipe.qk_nope_head_dim or spec.head_dim
    d_v = recipe.v_head_dim or spec.head_dim
    latent_rank = min(rank, full)
    if recipe.pad_for == "vllm":
        by_budget = recipe.kv_lora_rank is None
        if form.padded_by_runtimes:
            rank = min(full, _vllm_shape(min(rank, full), max(d_r, VLLM_ROTARY), d_n, d_v, by_budget=by_budget)[0])
        else:
            rank, d_r, d_n, d_v = _vllm_shape(rank, d_r, d_n, d_v, by_budget=by_budget)
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


def _can_be_padded(spec: AttentionSpec, recipe: Recipe, form: Format) -> bool:
    """Return whether ``--pad-for vllm`` makes a shape of the recipe's widths that can be converted."""
    try:
        shape = choose_shape(spec, recipe.model_copy(update={"pad_for": "vllm"}), form)
    except TransmlaError:
        return False
    return recipe.allow_no_saving or shape.cache_values < spec.cache_values


def _rotary_width(spec: AttentionSpec, ratio: float, budget: int, form: Format, recipe: Recipe) -> int:
    """Choose the rotary key's width: all, half or a quarter of a head's rotary channels; fewer for a small budget.

    Channels come in pairs, so an odd half or quarter is never chosen: of 100 channels, the width is 100 or 50.

    Slots that are chosen for each layer go to the few frequencies that matter, so an eighth of the channels is enough.
    In three unfitted layers of Gemma-3-270M, rotary 32 + latent 224 has 1.06, 1.0 and 0.7 times the error of 64 + 192.

    A fitted layer needs fewer rotary channels and gains more from a wide latent. On SmolLM2-135M, by the error of
    single layers on validation text, rotary 32 + latent 160 beats 64 + 128 by a third, and 16 + 112 beats 32 + 96 by
    a tenth. On Qwen2.5-Coder-0.5B, by KL, 16 + 112 (0.131 nats) beats 32 + 96 (0.171) and 8 + 120 (0.186).
    """
    wide, middle = (0.5, 0.2) if recipe.reconstruct == "off" else (1.0, 0.4)
    widest = 2 * max(kind.rotary_pairs for kind in spec.kinds or (spec.kind(0),))
    width, least = widest, widest // (1 if ratio >= wide else 2 if ratio >= middle else 4)
    while width > least and width % 4 == 0:
        width //= 2
    if recipe.reconstruct != "off" and ratio < 1:
        while width > widest // 4 and width > LARGEST_ROTARY_SHARE * budget and width % 4 == 0:
            width //= 2
    narrow = max(widest // 8, min(RANK_MULTIPLE, widest // 2))
    if measures_slots(spec, recipe) and ratio < 1 and narrow % 2 == 0 and widest % narrow == 0:
        width = min(width, narrow)
    while budget - width < RANK_MULTIPLE and width % 4 == 0:
        width //= 2
    # Some rotary tables (yarn) match the source at full width only.
    while width < widest and not form.holds_rotary(spec, width):
        width *= 2
    return width


def _vllm_shape(rank: int, d_r: int, d_n: int, d_v: int, *, by_budget: bool) -> tuple[int, int, int, int]:
    """Return the (kv_lora_rank, d_r, d_n, d_v) nearest to the given widths that vLLM has fast kernels for.

    Raises:
        TransmlaError: if no fast kernel takes these widths.
    """
    ranks = [r for r, rope in VLLM_DECODE if rope == d_r]
    larger = [r for r in ranks if r >= rank]
    smaller = [r for r in ranks if r <= rank]
    heads = [(n, v) for n, rope, v in VLLM_PREFILL if rope == d_r and n >= d_n and v >= d_v]
    if not heads or not (larger or (smaller and by_budget)):
        raise TransmlaError(
            f"no fast vLLM kernel takes rank {rank}, rope {d_r}, nope {d_n}, value {d_v}",
            limit="decode takes latents of 256 and 512 with rotary 64, prefill heads up to 192+64 and values up to 256",
            remedy="set --qk-rope-head-dim 64, or drop --pad-for",
        )
    # A rank from the cache budget is rounded down if a kernel allows it; an explicit rank is never reduced.
    chosen = max(smaller) if smaller and by_budget else min(larger)
    return chosen, d_r, *min(heads)
