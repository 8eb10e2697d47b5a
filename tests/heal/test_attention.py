"""Attention over whole sequences without transformers' masks computes what transformers' ``sdpa`` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_sources import build_model
from transformers import AutoModelForCausalLM, masking_utils

from transmla.convert.pipeline import convert
from transmla.heal.attention import attend_to_whole_sequences
from transmla.recipe import Recipe
from transmla.registry import scan

FAMILIES = scan("transmla.families", "FAMILY")
# More tokens than a window of the tiny families.
TOKENS = 24


def four_layers(family: str) -> dict[str, Any]:
    """Return changes of a tiny source that repeat its two layers."""
    tiny = FAMILIES[family].tiny
    by_layer = {name: value * 2 for name, value in tiny.items() if isinstance(value, list) and len(value) == 2}
    return {"num_hidden_layers": 4, **by_layer}


def compare(model: Any) -> None:
    """Compare logits and gradients of ``model`` under ``sdpa`` with those of the attention without masks."""
    tokens = torch.arange(3 * TOKENS).view(3, TOKENS) * 7 % 120
    results = []
    for maskless in (False, True):
        if maskless:
            assert attend_to_whole_sequences(model)
        model.zero_grad()
        logits = model(tokens, use_cache=False).logits
        logits.float().square().mean().backward()
        results.append((logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_computes_the_same(family: str) -> None:
    model = build_model(family, **four_layers(family))
    if model.config._attn_implementation != "sdpa":
        assert not attend_to_whole_sequences(model)
        return
    compare(model)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("layout", ["native", "transmla"])
def test_an_export_computes_the_same(
    family: str, layout: str, make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    if layout == "native" and family not in ("llama", "mistral"):
        layout = "transmla"
    source = make_source(family, **four_layers(family))
    folder = convert(make_recipe(source, cache_ratio=0.5, format=layout, dtype="float32", reconstruct="off"))
    compare(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def test_windows_are_those_of_the_config() -> None:
    model = build_model("gemma3_text", **four_layers("gemma3_text"), sliding_window=8)
    kinds = model.config.layer_types
    assert {"sliding_attention", "full_attention"} <= set(kinds)
    compare(model)
    found = [layer.self_attn.window_of_whole_sequences for layer in model.model.layers]
    assert found == [8 if kind == "sliding_attention" else None for kind in kinds]


@pytest.mark.parametrize("family", ["llama", "granite", "glm4", "olmo2", "mistral", "qwen2", "phi3", "smollm3"])
def test_a_window_counts_where_the_family_has_windows(family: str) -> None:
    """A llama's config.json may have the entry too, for example in a checkpoint that was a Mistral's."""
    compare(build_model(family, **four_layers(family), **{"sliding_window": 5}))


def test_no_mask_is_made_and_the_device_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' check for packed sequences waits for the GPU."""
    model = build_model("llama", num_hidden_layers=3)
    asked: list[int] = []
    checks = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda positions: (asked.append(1), checks(positions))[1]
    )
    model(torch.zeros(1, 8, dtype=torch.long), use_cache=False)
    assert asked
    asked.clear()
    attend_to_whole_sequences(model)
    model(torch.zeros(1, 8, dtype=torch.long), use_cache=False)
    assert not asked


@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("gemma3_text", 2)])
def test_layers_of_one_kind_are_compiled_once(family: str, kinds: int) -> None:
    """torch compiles no more than eight versions of a layer; with one for each, most layers would stay uncompiled."""
    model = build_model(family, **four_layers(family))
    attend_to_whole_sequences(model)
    torch._dynamo.reset()
    compiled: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=count)
    with torch.no_grad():
        model(torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    assert len(compiled) == kinds
