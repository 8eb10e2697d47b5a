"""transformers' DeepSeek-V3 attention against the float64 reference, for exports that are cut, padded or compressed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_layer import random_characters, relative
from transformers import DeepseekV3ForCausalLM

from transmla.convert.pipeline import convert
from transmla.core.reference_attention import absorbed_attention, expanded_attention
from transmla.formats.native import export_shape, layer_factors

TOKENS = torch.randint(0, 128, (2, 60), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(random_characters())
    return file


CUTS = {
    "half": ("mha", "default", {}, {"cache_ratio": 0.5}),
    "queries": ("gqa", "yarn", {}, {"kv_lora_rank": 24, "qk_rope_head_dim": 16, "q_lora_rank": 20}),
    "padded-heads": (
        "gqa9",
        "llama3",
        {},
        {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 20},
    ),
    "one-head": (
        "mqa",
        "linear",
        {},
        {"kv_lora_rank": 9, "qk_rope_head_dim": 4, "v_head_dim": 32, "q_lora_rank": 72},
    ),
    "custom-rope": (
        "gqa",
        "default",
        {},
        {"custom_rope": True, "qk_rope_head_dim": 48, "kv_lora_rank": 40, "method": "transmla"},
    ),
    "vllm": ("gqa", "default", {"head_dim": 64}, {"pad_for": "vllm", "kv_lora_rank": 60}),
}


@pytest.mark.parametrize("cut", CUTS)
@torch.no_grad()
def test_stock_attention_equals_the_reference_on_the_same_tensors(
    make_source: Callable[..., Path], make_recipe: Callable[..., Any], cut: str
) -> None:
    """DeepSeek-V3 of transformers computes the same as absorbed and expanded attention in float64."""
    layout, rope, changes, settings = CUTS[cut]
    source = make_source("llama", layout, rope, **changes)
    recipe = make_recipe(source, allow_no_saving=True, **settings)
    model = DeepseekV3ForCausalLM.from_pretrained(convert(recipe)).eval()
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(
            lambda _, args, kwargs, output: calls.append(((*args, kwargs.get("hidden_states"))[0], output[0])),
            with_kwargs=True,
        )
    model(TOKENS)
    assert len(calls) == model.config.num_hidden_layers
    rotary = model.model.rotary_emb
    heads, shape = model.config.num_attention_heads, export_shape(model.config)
    for layer, (x, output) in zip(model.model.layers, calls, strict=True):
        tensors = dict(layer.self_attn.named_parameters())
        factors = layer_factors(tensors, heads, shape, rotary.inv_freq.double(), float(rotary.attention_scaling) ** 2)
        for reference in (absorbed_attention, expanded_attention):
            assert relative(output.double(), reference(x.double(), factors)) <= 1e-4
