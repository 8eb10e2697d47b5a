"""The estimates of memory and context length that ``transmla plan`` shows."""

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
def test_layers_with_windows_stop_caching_at_their_window(free: int, windows: list[int | None], tokens: int) -> None:
    assert longest_context(free, [10, 10], windows) == tokens
    cached = sum(10 * min(tokens, window or tokens) for window in windows)
    assert cached <= free


def plan(family: str, **changes: Any) -> Any:
    wide = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    tiny = {**TINY, **wide, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    recipe = parse_recipe({"source": "s", "output": "o", **changes}, "test")
    return make_plan(describe(AutoConfig.for_model(family, **tiny)), recipe, "float32")


def test_normed_queries_and_keys_need_wider_work_matrices() -> None:
    """With the widths of Qwen3-0.6B the attention has 4,096 features, while its hidden states have 1,024 channels."""
    normed, plain = plan("qwen3"), plan("llama", format="transmla")
    assert (normed.spec.features, plain.spec.features) == (4096, 1024)
    more = memory_bytes(normed, 1024, None) - memory_bytes(plain, 1024, None)
    assert more > 8 * 12 * (4096**2 - 1024**2)
