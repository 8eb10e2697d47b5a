"""Healing exports of the own format: other coordinates, heads that do more to their logits, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_sources import SMALL_HEALING, build_tokenizer
from helpers.uncut_exports import FAMILIES, make_source, uncut
from transformers import AutoConfig, AutoModelForCausalLM

import transmla
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.evaluate.verify import verify
from transmla.families.base import TINY
from transmla.formats.base import format_named
from transmla.heal import natural_coordinates as natural
from transmla.heal import run
from transmla.heal.checks import check_models
from transmla.heal.losses import Head
from transmla.heal.run import heal
from transmla.heal.settings import Healing
from transmla.recipe import parse_recipe

Healed = Callable[..., Path]


@pytest.fixture
def healed(tmp_path: Path, text_file: Path) -> Healed:
    """``healed(family, **settings)``: a tiny source in ``tmp_path/source``, converted to ``/student`` and healed."""

    def make(family: str, layers: str | None = None, **settings: Any) -> Path:
        source, student = tmp_path / "source", tmp_path / "student"
        make_source(family, source, vocab_size=128)
        build_tokenizer(source, 128)
        calibration = {"source": str(text_file), "sequences": 8, "length": 48}
        named = {"source": str(source), "output": str(student), "calibration": calibration, "layers": layers}
        convert(parse_recipe(named | {"cache_ratio": 0.5, "device": "cpu", "reconstruct": "off"}, "test"))
        given = {"student": str(student), "teacher": str(source), "output": str(tmp_path / "healed")}
        wanted = {
            "data": (str(text_file),),
            "max_tokens": 32 * 8 * 40,
            "warmup": 0.1,
            "learning_rate": 2e-3,
            **settings,
        }
        return heal(Healing.model_validate(SMALL_HEALING | given | wanted))

    return make


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_the_familys(family: str, tmp_path: Path) -> None:
    model = make_source(family, tmp_path)
    ids = torch.arange(3, 20)[None]
    found = Head.of(model).logits(model.model(ids).last_hidden_state)
    assert torch.allclose(found, model(ids).logits, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_natural_coordinates_are_the_same_model(family: str, tmp_path: Path) -> None:
    source = make_source(family, tmp_path / "source")
    transmla.register()
    folder = uncut(source, tmp_path / "source", tmp_path / "export")
    model = transmla.load(folder, attn_implementation="eager")
    for _, attention in natural.attentions(model):
        # As conversions leave them: queries of one frequency large, and what they meet small.
        wide, rank = attention.qk_nope_head_dim, attention.kv_lora_rank
        query = (attention.q_b_proj or attention.q_proj).weight.unflatten(0, (attention.num_heads, -1))
        half = attention.qk_rope_head_dim // 2
        query[:, [wide, wide + half]] *= 1e3
        attention.kv_a_proj_with_mqa.weight[[rank, rank + half]] /= 1e3
        if attention.kv_a_proj_with_mqa.bias is not None:
            attention.kv_a_proj_with_mqa.bias[[rank, rank + half]] /= 1e3
            if attention.q_b_proj is None:
                attention.q_proj.bias.unflatten(0, (attention.num_heads, -1))[:, [wide, wide + half]] *= 1e3
    ids = torch.arange(3, 20)[None]
    wanted = model(ids).logits
    natural.to_natural(model, format_named("transmla"))
    assert (model(ids).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    for _, attention in natural.attentions(model):
        rows = attention.kv_a_proj_with_mqa.weight[attention.kv_lora_rank :].square().mean(1).sqrt()
        assert rows.max() < 30 * rows.min()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    assert all(
        torch.equal(weights[name], t)
        for name, t in natural.to_export(model, weights, format_named("transmla"), torch.float32).items()
    )


@pytest.mark.parametrize(
    ("family", "trainable", "layers"),
    [("qwen2", "all", None), ("qwen3", "attention", None), ("gemma2", "attention", "1"), ("mixtral", "lora", None)],
)
def test_it_heals_and_leaves_an_export(
    family: str, trainable: str, layers: str | None, healed: Healed, tmp_path: Path
) -> None:
    folder = healed(family, layers, trainable=trainable)
    told = json.loads((folder / "transmla.json").read_text())
    assert told["format"] == "transmla"
    kl = told["healing"][-1]["held_out_kl"]
    assert kl["after"] < 0.9 * kl["before"]
    assert [check for check in verify(folder, source=str(tmp_path / "source")) if not check.passed] == []
    assert "## Healing" in (folder / "README.md").read_text()


def test_the_student_learns_without_dropout(tmp_path: Path) -> None:
    source = make_source("starcoder2", tmp_path / "source", attention_dropout=0.5, residual_dropout=0.5)
    student = run.load_student(
        uncut(source, tmp_path / "source", tmp_path / "export"), format_named("transmla")
    ).train()
    ids = torch.arange(3, 20)[None]
    assert student(ids).logits.equal(student(ids).logits)
    assert student.config.attention_dropout == 0.5


def test_a_head_that_does_more_is_refused() -> None:
    config = AutoConfig.for_model("cohere", vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(TransmlaError, match="the teacher, 'cohere', does more to its logits than its head"):
        check_models(make(), model, SETTINGS)
    several = SimpleNamespace(config=AutoConfig.for_model("gemma3"))
    with pytest.raises(TransmlaError, match="the teacher, 'gemma3', is a model of text and more"):
        check_models(make(), several, SETTINGS)


def make() -> Any:
    tiny = {**TINY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **tiny)).eval()


SETTINGS = Healing(student="s", teacher="t", output="o")


def test_experts_are_not_trained(healed: Healed) -> None:
    with pytest.raises(TransmlaError, match="--trainable all does not reach experts"):
        healed("mixtral", trainable="all")
