"""What `plan` says a conversion and its cache will need."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from transmla.families.base import TINY
from transmla.plan.estimate import longest_context, memory_bytes
from transmla.plan.make_plan import make_plan
from transmla.recipe import parse_recipe
from transmla.source.describe import describe


@pytest.mark.parametrize(
    ("free", "windows", "tokens"),
    [
        (1000, [None, None], 50),
        (1000, [20, None], 80),
        (300, [20, None], 15),
        (450, [20, 30], 25),
        (1000, [20, 30], 30),
        (0, [20, None], 0),
    ],
)
def test_layers_with_windows_stop_growing(free: int, windows: list[int | None], tokens: int) -> None:
    assert longest_context(free, [10, 10], windows) == tokens
    held = sum(10 * min(tokens, window or tokens) for window in windows)
    assert held <= free


def plan(family: str, **changes: Any) -> Any:
    wide = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    tiny = {**TINY, **wide, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    recipe = parse_recipe({"source": "s", "output": "o", **changes}, "test")
    return make_plan(describe(AutoConfig.for_model(family, **tiny)), recipe, "float32")


def test_where_queries_and_keys_are_normed_matrices_are_as_wide_as_all_of_them() -> None:
    """Qwen3-0.6B reads 4,096 features where its hidden states have 1,024."""
    normed, plain = plan("qwen3"), plan("llama", format="transmla")
    assert (normed.spec.features, plain.spec.features) == (4096, 1024)
    more = memory_bytes(normed, 1024, None) - memory_bytes(plain, 1024, None)
    assert more > 8 * 12 * (4096**2 - 1024**2)
