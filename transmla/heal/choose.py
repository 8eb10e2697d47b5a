"""Choose the healing that ends a conversion: how long, which weights, and in what parts, from the device's memory."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from transmla.artifacts import Plan
from transmla.core.methods.base import method_named
from transmla.heal.memory import USABLE, Load, memory_bytes, trained_weights
from transmla.plan.estimate import export_bytes, parameters
from transmla.plan.estimate_time import Rates, healing_seconds
from transmla.plan.fit_settings import SMALL_CACHE
from transmla.recipe import Recipe
from transmla.recipe_values import HEAL_AUTO, HEAL_OFF

# Tokens of the default healing of models up to LARGE weights; larger models get fewer, in proportion, so that a
# healing takes minutes. An export that keeps less than SMALL_CACHE has more to learn, and gets SMALL_CACHE_TOKENS times
# as many.
TOKENS, SMALL_CACHE_TOKENS = 10_000_000, 1.4
LARGE = 2_000_000_000
FEWEST_TOKENS = 1_000_000
# Tokens per sequence, so that no position of usual evaluation windows is untrained; sequences per step; steps between
# two evaluations, each of which copies all weights; and tokens that are sampled for the text `self`: with the spare
# ones, as many as a GPU samples at once (``source.samples``), because a second batch would take as long as the first.
ON_GPU = {"length": 1024, "batch": 16, "eval_every": 100, "self_tokens": 940_000}
# On a CPU, one step of the above would take minutes, and so many samples hours.
ON_CPU = {"length": 256, "batch": 8, "eval_every": 10, "self_tokens": 16_384, "held_out": 4}
# Steps between two saved states.
SAVE_EVERY = 1000
# Most parts that a batch is computed in.
MOST_PARTS = 8
HOW = "transmla heal OUTPUT --teacher SOURCE -o HEALED"


@dataclass(frozen=True)
class Choice:
    """The healing at the end of a conversion.

    Attributes:
        settings: settings of the healing that differ from the defaults; None if there is none.
        reason: one line for the user: what is healed and how long, or why nothing is.
        disk_bytes: peak size of all folders of the healing in bytes; None if there is none.
    """

    settings: dict[str, Any] | None
    reason: str
    disk_bytes: int | None = None


def choose_healing(recipe: Recipe, plan: Plan, device: torch.device, free: int) -> Choice:
    """Choose the healing that ends the conversion of ``recipe``.

    Args:
        recipe: the recipe, with its request ``heal``.
        plan: plan of the conversion.
        device: the device that heals.
        free: free memory of the device in bytes.

    Returns:
        The choice. ``auto`` heals on a GPU that has the memory. MINUTES heals anywhere.
    """
    if recipe.heal == HEAL_OFF:
        return Choice(None, "")
    if recipe.heal == HEAL_AUTO and device.type != "cuda":
        return Choice(None, f"not healed, for want of a GPU: --heal MINUTES heals on a CPU, and later {HOW}")
    if recipe.heal == HEAL_AUTO and method_named(recipe.method).baseline:
        return Choice(None, f"not healed: method {recipe.method} is a baseline; --heal MINUTES heals it")
    # The default precision of ``heal``.
    half = device.type == "cuda"
    sizes = ON_CPU if device.type == "cpu" else ON_GPU
    for trainable in ("all", "attention", "lora"):
        if (trainable == "all" and plan.spec.experts) or (trainable == "lora" and not find_spec("peft")):
            continue
        for parts in (1, 2, 4, MOST_PARTS):
            if memory_bytes(plan, _load(trainable, parts, sizes, half=half)) <= USABLE * free:
                return _chosen(recipe, plan, trainable, parts, sizes)
    least = memory_bytes(plan, _load("lora" if find_spec("peft") else "attention", MOST_PARTS, sizes, half=half))
    return Choice(
        None,
        f"not healed: that needs {least / 1e9:.0f} GB of memory, and {free * USABLE / 1e9:.0f} GB are free; "
        f"on several GPUs: accelerate launch -m {HOW}",
    )


def _load(trainable: str, parts: int, sizes: dict[str, int], *, half: bool) -> Load:
    """Return the load of a healing with batches in ``parts`` parts; with MOST_PARTS, activations are recomputed."""
    return Load(trainable, sizes["batch"] * sizes["length"] // parts, parts == MOST_PARTS, half)


def _chosen(recipe: Recipe, plan: Plan, trainable: str, parts: int, sizes: dict[str, int]) -> Choice:
    settings: dict[str, Any] = {
        "trainable": trainable,
        "accumulate": parts,
        "checkpointing": parts == MOST_PARTS,
        "save_every": SAVE_EVERY,
        **sizes,
        "length": min(sizes["length"], plan.spec.max_position_embeddings),
    }
    if recipe.heal == HEAL_AUTO:
        tokens = TOKENS * (SMALL_CACHE_TOKENS if plan.cache_ratio < SMALL_CACHE else 1.0)
        tokens = max(FEWEST_TOKENS, round(tokens * min(1.0, LARGE / parameters(plan))))
        settings["max_tokens"] = tokens
        amount = f"{tokens / 1e6:.0f} million tokens"
    else:
        settings["max_minutes"] = recipe.heal
        amount = f"{recipe.heal:g} minutes"
    what = {"all": "all weights", "attention": "the attention", "lora": "low-rank updates of the attention"}[trainable]
    reason = f"ends with a healing of {amount}, {what} (--heal off leaves it out)"
    return Choice(settings, reason, disk_bytes(plan, trainable))


def estimated_seconds(
    choice: Choice, plan: Plan, rates: Rates, processes: int = 1, *, sharded: bool = False
) -> float | None:
    """Return the estimated time of the healing ``choice`` in seconds; None if there is none, or minutes were asked.

    Args:
        choice: the healing.
        plan: plan of the conversion.
        rates: rates of the device of one process.
        processes: number of processes that share its batches.
        sharded: whether they divide the student's weights; otherwise each holds the whole student.
    """
    if choice.settings is None or "max_tokens" not in choice.settings:
        return None
    batch = choice.settings["batch"] * choice.settings["length"]
    tokens = choice.settings["max_tokens"]
    return healing_seconds(parameters(plan), plan.spec, tokens, batch, rates, processes, sharded=sharded)


def disk_bytes(plan: Plan, trainable: str) -> int:
    """Return the estimated peak size of all folders of a healing in bytes.

    These are the unhealed export; two states, each with the float32 weights and Adam's two moments, because a newer one
    is written before the older one is deleted; and twice the best trained weights. The healed export, which is written
    when one state is left, is smaller than the other one.

    Args:
        plan: plan of the export.
        trainable: ``all``, ``attention`` or ``lora``.
    """
    trained = trained_weights(plan, trainable)
    return export_bytes(plan) + 2 * (4 * parameters(plan) + 8 * trained + 4 * trained)
