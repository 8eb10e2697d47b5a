"""Native exports have weights of ordinary size, and configs that older loaders read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from transmla.convert.pipeline import convert
from transmla.formats import native, native_layout
from transmla.recipe import Recipe

LAYERS = 3
TOKENS = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(7))
# Scales below this value are zero for int8 quantisers.
SMALLEST_SCALE = 1.2e-7


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


def make(make_source: Callable[..., Path], make_recipe: Callable[..., Recipe], **settings: Any) -> tuple[Path, Path]:
    source = make_source("llama", "gqa", num_hidden_layers=LAYERS)
    return source, convert(make_recipe(source, dtype="float32", **settings))


@pytest.mark.parametrize("queries", [None, 24])
def test_the_input_scale_changes_nothing(
    queries: int | None,
    make_source: Callable[..., Path],
    make_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    _, scaled = make(make_source, make_recipe, q_lora_rank=queries)
    for module in (native, native_layout):
        monkeypatch.setattr(module, "INPUT_SCALE", 1.0)
    monkeypatch.setattr(native.NativeFormat, "input_scale", 1.0)
    _, plain = make(make_source, make_recipe, q_lora_rank=queries, output=str(tmp_path / "plain"))
    ours, theirs = load(scaled), load(plain)
    assert torch.equal(logits(ours), logits(theirs))
    rows = [
        model.model.layers[1].self_attn.kv_a_proj_with_mqa.weight[: model.config.kv_lora_rank].square().mean().sqrt()
        for model in (ours, theirs)
    ]
    assert float(rows[0] / rows[1]) == 2.0**17


def quantise(model: Any) -> None:
    """Round every linear weight of ``model`` to int8, with one scale for each row, as int8 quantisers do."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=SMALLEST_SCALE)
            module.weight.data = (weight / scale).round().clamp(-128, 127) * scale


def test_int8_costs_an_export_no_more_than_its_source(
    make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    changes = []
    for folder in make(make_source, make_recipe, cache_ratio=0.5):
        model = load(folder)
        before = logits(model)
        quantise(model)
        changes.append(float((logits(model) - before).square().mean().sqrt() / before.std()))
    assert 0 < changes[1] < 2 * changes[0]


@pytest.mark.parametrize("rope", ["default", "llama3"])
def test_older_loaders_find_the_rotary_base(
    rope: str, make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    source = make_source("llama", "mqa", rope)
    folder = convert(make_recipe(source, qk_rope_head_dim=16, kv_lora_rank=12, allow_no_saving=True))
    config = json.loads((folder / "config.json").read_text())
    parameters = config["rope_parameters"]
    assert config["rope_theta"] == parameters["rope_theta"]
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    assert config.get("rope_scaling") == (None if rope == "default" else scaling)
    # transformers 5 reads both, and finds the same.
    loaded = load(folder).config.rope_parameters
    assert {key: loaded[key] for key in parameters} == parameters
