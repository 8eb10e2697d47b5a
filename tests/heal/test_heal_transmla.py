"""Healing of exports in the transmla format: natural coordinates, the heads of families, and the healed export."""

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
    """Return a function that makes a tiny source of a family, converts it, heals it, and returns the output folder.

    Source and student are ``tmp_path/source`` and ``tmp_path/student``.
    """

    def make(family: str, layers: str | None = None, **settings: Any) -> Path:
        source, student = tmp_path / "source", tmp_path / "student"
        make_source(family, source, vocab_size=128)
        build_tokenizer(source, 128)
        calibration = {"source": str(text_file), "sequences": 8, "length": 48}
        recipe = {"source": str(source), "output": str(student), "calibration": calibration, "layers": layers}
        convert(parse_recipe(recipe | {"cache_ratio": 0.5, "device": "cpu", "reconstruct": "off"}, "test"))
        paths = {"student": str(student), "teacher": str(source), "output": str(tmp_path / "healed")}
        options = {
            "data": (str(text_file),),
            "max_tokens": 32 * 8 * 40,
            "warmup": 0.1,
            "learning_rate": 2e-3,
            **settings,
        }
        return heal(Healing.model_validate(SMALL_HEALING | paths | options))

    return make


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_head_reproduces_the_familys_logits(family: str, tmp_path: Path) -> None:
    model = make_source(family, tmp_path)
    ids = torch.arange(3, 20)[None]
    logits = Head.of(model).logits(model.model(ids).last_hidden_state)
    assert torch.allclose(logits, model(ids).logits, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_natural_coordinates_keep_the_logits(family: str, tmp_path: Path) -> None:
    source = make_source(family, tmp_path / "source")
    transmla.register()
    folder = uncut(source, tmp_path / "source", tmp_path / "export")
    model = transmla.load(folder, attn_implementation="eager")
    for _, attention in natural.attentions(model):
        # As after a conversion: large query rows of one frequency, and small key rows.
        nope_dim, rank = attention.qk_nope_head_dim, attention.kv_lora_rank
        query = (attention.q_b_proj or attention.q_proj).weight.unflatten(0, (attention.num_heads, -1))
        half = attention.qk_rope_head_dim // 2
        query[:, [nope_dim, nope_dim + half]] *= 1e3
        attention.kv_a_proj_with_mqa.weight[[rank, rank + half]] /= 1e3
        if attention.kv_a_proj_with_mqa.bias is not None:
            attention.kv_a_proj_with_mqa.bias[[rank, rank + half]] /= 1e3
            if attention.q_b_proj is None:
                attention.q_proj.bias.unflatten(0, (attention.num_heads, -1))[:, [nope_dim, nope_dim + half]] *= 1e3
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    natural.to_natural(model, format_named("transmla"))
    assert (model(ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()
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
def test_healing_lowers_the_kl_and_writes_a_valid_export(
    family: str, trainable: str, layers: str | None, healed: Healed, tmp_path: Path
) -> None:
    folder = healed(family, layers, trainable=trainable)
    manifest = json.loads((folder / "transmla.json").read_text())
    assert manifest["format"] == "transmla"
    kl = manifest["healing"][-1]["held_out_kl"]
    assert kl["after"] < 0.9 * kl["before"]
    assert [check for check in verify(folder, source=str(tmp_path / "source")) if not check.passed] == []
    assert "## Healing" in (folder / "README.md").read_text()


def test_the_student_trains_without_dropout(tmp_path: Path) -> None:
    source = make_source("starcoder2", tmp_path / "source", attention_dropout=0.5, residual_dropout=0.5)
    student = run.load_student(
        uncut(source, tmp_path / "source", tmp_path / "export"), format_named("transmla")
    ).train()
    ids = torch.arange(3, 20)[None]
    assert student(ids).logits.equal(student(ids).logits)
    assert student.config.attention_dropout == 0.5


def test_unsupported_heads_and_multimodal_models_are_refused() -> None:
    config = AutoConfig.for_model("cohere", vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(TransmlaError, match="the teacher, 'cohere', changes its logits after the head"):
        check_models(make_llama(), model, SETTINGS)
    multimodal = SimpleNamespace(config=AutoConfig.for_model("gemma3"))
    with pytest.raises(TransmlaError, match="the teacher, 'gemma3', is a multimodal model"):
        check_models(make_llama(), multimodal, SETTINGS)


def make_llama() -> Any:
    tiny = {**TINY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **tiny)).eval()


SETTINGS = Healing(student="s", teacher="t", output="o")


def test_experts_are_not_trained(healed: Healed) -> None:
    with pytest.raises(TransmlaError, match="--trainable all does not support experts"):
        healed("mixtral", trainable="all")
