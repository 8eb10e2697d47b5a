"""Whole conversions: where one rotary key can represent all key heads, the export's logits equal the source's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_layer import random_characters, relative
from helpers.tiny_sources import ROPES, build_model, build_tokenizer
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from transmla.convert.pipeline import convert
from transmla.core.rope import to_complex, to_halves
from transmla.errors import TransmlaError
from transmla.export.hashes import MANIFEST
from transmla.registry import scan
from transmla.source.describe import describe

METHODS = scan("transmla.core.methods", "METHOD")
ALL_FAMILIES = scan("transmla.families", "FAMILY")
FAMILIES = [name for name in ALL_FAMILIES if describe(build_model(name).config).native_gap is None]
EPS = {"rms_norm_eps": 1e-6}
# Recipe for MQA with nothing cut: the rotary key holds the only key head, the latent holds the values.
UNCUT = {"qk_rope_head_dim": 16, "kv_lora_rank": 16, "freqfold": 1, "allow_no_saving": True}
TOKENS = torch.randint(0, 128, (2, 60), generator=torch.Generator().manual_seed(5))
EXACT = 1e-4


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(random_characters())
    return file


@torch.no_grad()
def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the logits that stock transformers computes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return model.eval()(TOKENS).logits.float()


def difference(source: Path, export: Path) -> float:
    """Return the largest absolute difference of float32 logits, which are of size 1 to 10."""
    return float((logits(export) - logits(source)).abs().max())


def test_a_cut_changes_the_logits_by_far_more_than_the_tolerance(
    make_source: Callable[..., Path], make_recipe: Callable[..., Any]
) -> None:
    """Otherwise the exactness tests below would show nothing. The logits also vary, so attention matters."""
    source = make_source("llama", "mqa", **EPS)
    export = convert(make_recipe(source, **{**UNCUT, "kv_lora_rank": 12}))
    assert difference(source, export) > 100 * EXACT
    assert float(logits(source).std()) > 0.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_one_key_head_is_exact(
    make_source: Callable[..., Path], make_recipe: Callable[..., Any], family: str, method: str
) -> None:
    source = make_source(family, "mqa", **EPS)
    assert difference(source, convert(make_recipe(source, method=method, **UNCUT))) <= EXACT


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "default"])
def test_rotary_scalings_are_exact(
    make_source: Callable[..., Path], make_recipe: Callable[..., Any], rope: str
) -> None:
    source = make_source("llama", "mqa", rope, **EPS)
    assert difference(source, convert(make_recipe(source, **UNCUT))) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("layout", "rank", "real", "method"),
    [("mha", 64, False, "calibrated"), ("gqa", 48, False, "calibrated"), ("gqa9", 48, True, "transmla")],
)
def test_key_heads_that_are_multiples_of_one_head_are_exact(
    tmp_path: Path,
    make_recipe: Callable[..., Any],
    family: str,
    layout: str,
    rank: int,
    real: bool,
    method: str,
) -> None:
    """With k_{g,f} = z_{g,f}·k_{0,f}, one rotary key per frequency represents all key heads."""
    model = build_model(family, layout, **EPS)
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        weight = layer.self_attn.k_proj.weight
        keys = to_complex(weight.detach().double().view(-1, 16, weight.shape[-1]))
        z = torch.randn(*keys.shape[:2], 1, generator=generator, dtype=torch.complex128)
        z = z.real if real else z
        weight.data = to_halves(z * keys[:1]).flatten(0, 1).float()
    model.save_pretrained(tmp_path / "source")
    build_tokenizer(tmp_path / "source")
    recipe = make_recipe(tmp_path / "source", kv_lora_rank=rank, qk_rope_head_dim=16, freqfold=1, method=method)
    assert difference(tmp_path / "source", convert(recipe)) <= EXACT


@pytest.mark.parametrize(
    ("layout", "rope", "method"),
    [
        ("mha", "default", "calibrated"),
        ("gqa", "llama3", "calibrated"),
        ("gqa9", "default", "transmla"),
        ("gqa9", "llama3", "calibrated"),
    ],
)
def test_a_repeated_rotary_table_is_exact_for_any_heads(
    make_source: Callable[..., Path], make_recipe: Callable[..., Any], layout: str, rope: str, method: str
) -> None:
    """Every key head has its own rotary channels, and the latent is as wide as the hidden states: nothing is cut."""
    source = make_source("llama", layout, rope, **EPS)
    width = 16 * {"mha": 4, "gqa": 3, "gqa9": 3}[layout]
    recipe = make_recipe(
        source,
        custom_rope=True,
        qk_rope_head_dim=width,
        kv_lora_rank=72,
        method=method,
        allow_no_saving=True,
    )
    assert difference(source, convert(recipe)) <= EXACT


@pytest.mark.parametrize("rope", ["default", "linear", "llama3"])
def test_half_the_rotary_width_uses_every_second_frequency(
    make_source: Callable[..., Path], make_recipe: Callable[..., Any], rope: str
) -> None:
    source = make_source("llama", "gqa", rope)
    export = convert(make_recipe(source, qk_rope_head_dim=8, kv_lora_rank=32))
    assert json.loads((export / MANIFEST).read_text())["plan"]["rotary"]["slots"] == [0, 2, 4, 6]
    model = DeepseekV3ForCausalLM.from_pretrained(export)
    source_rotary = AutoModelForCausalLM.from_pretrained(source).model.rotary_emb
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, source_rotary.inv_freq[::2], rtol=1e-6, atol=0)
    assert bool(logits(export).isfinite().all())


def test_yarn_at_half_width_is_refused(
    make_source: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Yarn blends frequencies by the width, so the half-width table is not a subset of the source's table."""
    source = make_source("llama", "gqa", "yarn")
    with pytest.raises(TransmlaError, match=r"the source does not have[\s\S]*full width"):
        convert(make_recipe(source, qk_rope_head_dim=8, kv_lora_rank=32))
    assert not (tmp_path / "out").exists()


def test_a_bfloat16_source_is_exact_up_to_rounding(
    make_source: Callable[..., Path], make_recipe: Callable[..., Any]
) -> None:
    """The export's error is at most a few times that of running the source itself in bfloat16."""
    source = make_source("llama", "mqa", dtype=torch.bfloat16, **EPS)
    export = convert(make_recipe(source, **UNCUT))
    assert AutoModelForCausalLM.from_pretrained(export).dtype == torch.bfloat16
    plain = logits(source)
    rounding = relative(logits(source, torch.bfloat16), plain)
    assert relative(logits(export), plain) <= 2 * rounding
    assert relative(logits(export, torch.bfloat16), plain) <= 3 * rounding


def test_norms_stay_identities_for_tokens_outside_the_calibration_text(
    make_source: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """The calibration text has four distinct tokens, the test prompt has all; the query rank is full."""
    source, text = make_source("llama", "mqa", **EPS), tmp_path / "narrow.txt"
    text.write_text("cat mat " * 400)
    export = convert(make_recipe(source, q_lora_rank=72, calibration={"source": str(text)}, **UNCUT))
    assert difference(source, export) <= EXACT
