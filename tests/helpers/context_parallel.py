"""What a model computes alone, or as one of several processes that share its caches."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import transmla
from helpers.behaviour import KEPT, stock_model
from helpers.graph_models import longer, prompts, with_graphs, written
from helpers.mla_models import tiny
from transmla.errors import TransmlaError
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.ranks import leave
from transmla.runtime import latent_cache
from transmla.runtime.latent_cache import latent_bytes

# New tokens of each step: prompts, single tokens, and pieces that are read in absorbed and in expanded form.
WIDTHS = {"prompt": (20, 1, 1, 3, 1, 200, 1), "one token": (1, 1, 1, 4, 1), "two prompts": (7, 9, 1, 1)}
# Families whose steps are captured into graphs: of the native format, and of the transmla format.
GRAPHED = ("deepseek_v3", "llama")
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


def shared_model(family: str, folder: Path, cache_dtype: str | None, device: str = "cpu") -> Any:
    """Return a random model of four layers. Unless its family is of ``GRAPHED``, one keeps the source's attention."""
    if family == "deepseek_v3":
        model = tiny(num_hidden_layers=4, first_k_dense_replace=4)
    else:
        model = stock_model(family, folder, keep=() if family in GRAPHED else (KEPT,))
    return transmla.accelerate(model.to(device), cache_dtype=cache_dtype, context_parallel=True)


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
    with pytest.MonkeyPatch.context() as patch:
        # Buffers of 64 rows, which 3 processes fill with 192 tokens.
        patch.setattr(latent_cache, "STEP", 8)
        patch.setattr(latent_cache, "BATCH_STEP", 0)
        found["logits from graphs of growing buffers"], _ = logits(model, (20, *[1] * 180), 6)
    for padded in (0, 6):
        found[f"logits from graphs, padded {padded}"], _ = logits(model, (20, *[1] * 30, 3, *[1] * 5), padded)
    found["replays"], found["reason"] = graphs.replays, graphs.reason
    model.set_attn_implementation("eager")
    found["logits of eager"], _ = logits(model, WIDTHS["prompt"], 6)
    model.set_attn_implementation("latent_attention")
    return found


def save_results(rank: int, family: str, cache_dtype: str | None, folder: str, device: str = "cpu") -> None:
    """Save the results of process ``rank`` to ``folder``."""
    own = Path(folder) / str(rank)
    own.mkdir()
    model = shared_model(family, own, cache_dtype, device)
    # As a user's processes: each has another random state.
    torch.manual_seed(rank)
    torch.save(results(model), own / "results.pt")


def load_divided(rank: int, folder: str) -> None:
    """Load models whose weights transformers divides, and compare their tokens with those of whole models."""
    for family, heads_divided in (("deepseek_v3", False), ("minicpm3", True)):
        path = Path(folder) / family
        whole, divided = transmla.load(path), transmla.load(path, tp_plan="auto")
        assert ("generate" in divided.__dict__) != heads_divided
        assert divided.model.layers[1].mlp.gate_proj.weight.to_local().shape[0] == 32
        inputs = prompts(divided.device, 2, 5)
        assert torch.equal(written(divided, inputs), written(whole, inputs))
        if heads_divided:
            with pytest.raises(TransmlaError, match="divides the attention heads of MiniCPM3"):
                transmla.accelerate(divided, context_parallel=True)


def refuse_mistakes(rank: int) -> None:
    """Call ``generate`` and ``load`` with mistakes, which both processes refuse; then without."""
    model = transmla.accelerate(tiny(), context_parallel=True)
    inputs = prompts(model.device)
    other_inputs = {name: t + rank for name, t in inputs.items()}
    for given, settings in ((other_inputs, {}), (inputs, {"max_new_tokens": 30 + rank})):
        with pytest.raises(TransmlaError, match=r"other arguments in process 1 than in process 0; .*; give the same"):
            written(model, given, **settings)
    with pytest.raises(TransmlaError, match=r"max_time with context_parallel; .*; give max_new_tokens"):
        written(model, inputs, max_time=60.0)
    with pytest.raises(TransmlaError, match="cannot share a StaticLayer"):
        written(model, inputs, cache_implementation="static")
    with pytest.raises(TransmlaError, match=r"device_map 'cuda:1' was given to several .*CUDA_VISIBLE_DEVICES"):
        transmla.load("nowhere", context_parallel=True, device_map="cuda:1")
    with pytest.raises(TransmlaError, match=f"process {rank} lies on meta"):
        transmla.accelerate(tiny().to("meta"), context_parallel=True)
    assert written(model, inputs, pad_token_id=torch.tensor(1)).shape[0] == 2
    transmla.accelerate(model)
    assert "generate" not in model.__dict__


if __name__ == "__main__":
    # Started by torchrun on GPUs. transformers saves the source of a model in all processes until they are connected.
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    save_results(int(os.environ["RANK"]), sys.argv[1], None, sys.argv[2], "cuda")
    leave()
