"""Models whose layers lie on several devices, some of them on the disk, as accelerate loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour import CACHES, logits_by_step, relative, stock_model

import transmla
from transmla.runtime.latent_cache import LatentLayer

accelerate = pytest.importorskip("accelerate")
ROUNDING = 2e-5


@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "qwen3"])
@pytest.mark.parametrize("first", ["offloaded", "accelerated"])
def test_offloaded_weights(family: str, first: str, tmp_path: Path) -> None:
    model: Any = stock_model(family, tmp_path, keep=())
    expected = logits_by_step(model, CACHES["dynamic"](model.config), "left")
    if first == "accelerated":
        transmla.accelerate(model)
    accelerate.disk_offload(model, tmp_path / "offloaded", execution_device=torch.device("cpu"))
    if first == "offloaded":
        transmla.accelerate(model)
    assert relative(logits_by_step(model, CACHES["dynamic"](model.config), "left"), expected) < ROUNDING


# A place for each part of a model of four layers.
PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "cpu"}
PLACES |= {f"model.layers.{i}": place for i, place in enumerate(("cpu", "disk", "disk", "cpu"))}


@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "qwen3"])
@pytest.mark.parametrize("cache_dtype", [None, "float8_e4m3fn"])
def test_a_model_loaded_onto_several_devices(family: str, cache_dtype: str | None, tmp_path: Path) -> None:
    model: Any = stock_model(family, tmp_path, keep=())
    model.save_pretrained(tmp_path / "saved")
    found = []
    for options in ({}, {"device_map": PLACES, "offload_folder": tmp_path / "offloaded"}):
        loaded = transmla.load(tmp_path / "saved", cache_dtype=cache_dtype, **options)
        cache = CACHES["dynamic"](model.config)
        found.append(logits_by_step(loaded, cache, "left"))
        assert all(
            isinstance(layer, LatentLayer) and layer.packed == (cache_dtype is not None) for layer in cache.layers
        )
    assert relative(*found) < ROUNDING
