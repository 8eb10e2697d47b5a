"""What a model computes alone, or as one of several processes that share its caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import transmla
from helpers.behaviour import stock_model
from helpers.graph_models import longer, prompts, with_graphs, written
from helpers.mla_models import tiny
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.latent_cache import latent_bytes

# New tokens of each step: prompts, single tokens, and pieces that are read in absorbed and in expanded form.
WIDTHS = {"prompt": (20, 1, 1, 3, 1, 200, 1), "one token": (1, 1, 1, 4, 1), "two prompts": (7, 9, 1, 1)}
# Settings of generate(), number of prompts, and padded tokens of the first one.
WAYS: dict[str, tuple[dict[str, Any], int, int]] = {
    "greedy": ({}, 2, 0),
    "left padding": ({}, 3, 5),
    "sampling": ({"do_sample": True, "num_return_sequences": 2}, 2, 5),
    "beams": ({"num_beams": 3}, 2, 5),
    "prompt lookup": ({"prompt_lookup_num_tokens": 4}, 1, 0),
    "pieces of a prompt": ({"prefill_chunk_size": 8}, 2, 5),
    "cache without config": ({"past_key_values": None}, 2, 0),
}


def shared_model(family: str, folder: Path, cache_dtype: str | None) -> Any:
    """Return a random model of four layers, whose third layer keeps the source's attention in the transmla format."""
    native = family == "deepseek_v3"
    model = tiny(num_hidden_layers=4, first_k_dense_replace=4) if native else stock_model(family, folder)
    return transmla.accelerate(model, cache_dtype=cache_dtype, context_parallel=True)


@torch.no_grad()
def logits(model: Any, widths: tuple[int, ...], padded: int) -> tuple[Tensor, Any]:
    """Return the logits of tokens that are read in steps of ``widths`` tokens, and the cache.

    The first of two rows begins with ``padded`` tokens of padding, whose logits are left out.
    """
    tokens, cache = longer(model, sum(widths)), DynamicCache(config=model.config)
    mask = torch.ones_like(tokens)
    mask[0, :padded] = 0
    places, parts, at = (mask.cumsum(-1) - 1).clamp_min(0), [], 0
    for width in widths:
        piece = slice(at, at + width)
        given = {"attention_mask": mask[:, : at + width], "position_ids": places[:, piece]} if padded else {}
        parts.append(model(tokens[:, piece], use_cache=True, **{CACHE_ARGUMENT: cache}, **given).logits)
        at += width
    return torch.cat(parts, 1)[mask.bool()], cache


def results(model: Any) -> dict[str, Any]:
    """Return logits by case, tokens by way of ``generate``, and the bytes of a cache."""
    found: dict[str, Any] = {}
    for name, widths in WIDTHS.items():
        for padded in (0, 1, 6):
            if padded < widths[0] or padded == 0:
                found[f"logits of {name}, padded {padded}"], cache = logits(model, widths, padded)
    found["bytes"] = latent_bytes(cache)
    for name, (settings, batch, padded) in WAYS.items():
        inputs = prompts(model.device, batch, padded)
        if name == "cache without config":
            settings = {CACHE_ARGUMENT: DynamicCache()}
        found[f"tokens of {name}"] = written(model, inputs, **settings)
    graphs = with_graphs(model)
    for name in ("left padding", "beams"):
        settings, batch, padded = WAYS[name]
        found[f"tokens of {name}, from graphs"] = written(model, prompts(model.device, batch, padded), **settings)
    for padded in (0, 6):
        found[f"logits from graphs, padded {padded}"], _ = logits(model, (20, *[1] * 30, 3, *[1] * 5), padded)
    found["replays"], found["reason"] = graphs.replays, graphs.reason
    model.set_attn_implementation("eager")
    found["logits of eager"], _ = logits(model, WIDTHS["prompt"], 6)
    model.set_attn_implementation("latent_attention")
    return found


def save_results(rank: int, family: str, cache_dtype: str | None, folder: str) -> None:
    """Save the results of process ``rank`` to ``folder``."""
    own = Path(folder) / str(rank)
    own.mkdir()
    if rank > 0:
        # As a user's processes: each has another random state.
        torch.manual_seed(rank)
    torch.save(results(shared_model(family, own, cache_dtype)), own / "results.pt")
