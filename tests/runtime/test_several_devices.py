"""Models whose layers lie on several devices, some of them on the disk, as accelerate loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour import CACHES, logits_by_step, relative, stock_model

import transmla

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
