"""The estimates of memory and context length that ``transmla plan`` shows."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from transmla.families.base import TINY
from transmla.formats.base import format_named
from transmla.plan.estimate import longest_context, memory_bytes, parameters, source_parameters
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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "form"), [("llama", "native"), ("llama", "transmla"), ("qwen3", "transmla")])
def test_a_tied_head_counts_once_in_the_source(family: str, form: str, tied: bool) -> None:
    config = AutoConfig.for_model(family, **TINY, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    spec, head = describe(config), config.vocab_size * config.hidden_size
    attention = sum(p.numel() for layer in model.model.layers for p in layer.self_attn.parameters())
    assert spec.other_parameters == sum(p.numel() for p in model.parameters()) - attention
    recipe = parse_recipe({"source": "s", "output": "o", "format": form}, "test")
    made = make_plan(spec, recipe, "float32")
    # The norms of queries and keys are left out.
    assert source_parameters(made) == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-2)
    outside = parameters(made) - spec.num_hidden_layers * format_named(form).attention_parameters(made)
    # The native format writes the head beside the embedding.
    assert outside == spec.other_parameters + (head if tied and form == "native" else 0)
