"""Native exports refuse float16, where their latent norms underflow; other models run in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.mla_models import tiny
from transformers import AutoModelForCausalLM

import transmla
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.recipe import Recipe

PROMPT = torch.arange(2, 12)[None]


def test_float16_is_refused_on_loading(pair: tuple[Path, Path]) -> None:
    with pytest.raises(TransmlaError, match=r"cannot compute in float16.*bfloat16 or float32"):
        transmla.load(pair[1], dtype=torch.float16)
    plain = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float16)
    with pytest.raises(TransmlaError, match="cannot compute in float16"):
        transmla.accelerate(plain)


def test_float16_is_refused_when_it_comes_later(pair: tuple[Path, Path]) -> None:
    model = transmla.load(pair[1], dtype=torch.float32)
    with pytest.raises(TransmlaError, match="cannot compute in float16"), torch.autocast("cpu", torch.float16):
        model(PROMPT)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(PROMPT).logits.isfinite().all()
    with pytest.raises(TransmlaError, match="cannot compute in float16"):
        model.half()(PROMPT)


@pytest.mark.parametrize("rank", [None, 24])
def test_an_export_with_compressed_queries_refuses_it_too(
    rank: int | None, make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    folder = convert(make_recipe(make_source(num_hidden_layers=3), q_lora_rank=rank, cache_ratio=0.5))
    with pytest.raises(TransmlaError, match="cannot compute in float16"):
        transmla.load(folder, dtype="float16")


def test_models_without_an_identity_norm_run_in_float16(
    pair: tuple[Path, Path], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    own = convert(make_recipe(pair[0], output="own", format="transmla", cache_ratio=0.5))
    expected = transmla.load(own, dtype=torch.float32)(PROMPT).logits
    half = transmla.load(own, dtype=torch.float16)
    assert (half(PROMPT).logits.float() - expected).norm() < 0.02 * expected.norm()
    with torch.autocast("cpu", torch.float16):
        half(PROMPT)
    shutil.rmtree(own)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_a_model_with_real_norms_runs_in_float16(family: str) -> None:
    assert transmla.accelerate(tiny(family, num_hidden_layers=3).half())(PROMPT).logits.isfinite().all()
