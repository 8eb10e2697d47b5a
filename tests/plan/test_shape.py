"""The widths that a cache ratio chooses."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config

from transmla.plan.make_plan import make_plan
from transmla.recipe import parse_recipe
from transmla.source.describe import describe

SMOLLM2 = LlamaConfig(
    hidden_size=576, num_hidden_layers=3, num_attention_heads=9, num_key_value_heads=3, rope_theta=100_000.0
)
QWEN = {"num_hidden_layers": 3, "num_key_value_heads": 2}
QWEN_0_5B = Qwen2Config(hidden_size=896, num_attention_heads=14, **QWEN)
QWEN_1_5B = Qwen2Config(hidden_size=1536, num_attention_heads=12, **QWEN)
LLAMA_8B = LlamaConfig(hidden_size=4096, num_hidden_layers=3, num_attention_heads=32, num_key_value_heads=8)


@pytest.mark.parametrize(
    ("config", "ratio", "fit", "widths"),
    [
        (SMOLLM2, 0.5, "full", (32, 160)),
        (SMOLLM2, 1 / 3, "full", (16, 112)),
        (SMOLLM2, 0.25, "full", (16, 80)),
        (SMOLLM2, 0.125, "full", (16, 32)),
        (SMOLLM2, 0.5, "off", (64, 128)),
        (QWEN_0_5B, 0.5, "full", (16, 112)),
        (QWEN_0_5B, 0.5, "fast", (16, 112)),
        (QWEN_0_5B, 0.25, "full", (16, 48)),
        (QWEN_0_5B, 0.5, "off", (64, 64)),
        (QWEN_1_5B, 0.5, "full", (32, 224)),
        (LLAMA_8B, 0.5, "full", (64, 960)),
    ],
)
def test_a_fitted_export_has_a_narrow_rotary_key(config: Any, ratio: float, fit: str, widths: tuple[int, int]) -> None:
    recipe = parse_recipe({"source": "x", "output": "y", "cache_ratio": ratio, "reconstruct": fit}, "test")
    shape = make_plan(describe(config), recipe, "bfloat16").shape
    assert (shape.qk_rope_head_dim, shape.kv_lora_rank) == widths
