"""Heads of two widths: which kernel attends to a long prompt."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour import relative
from helpers.graph_models import longer, plain_model
from torch import Tensor

from transmla.modeling import sdpa


@torch.no_grad()
def test_unpadded_values_give_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model("llama", tmp_path)
    tokens, seen = longer(model, 24), []

    def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
        seen.append((query.shape[-1], value.shape[-1]))
        return True

    expected = model(tokens).logits
    monkeypatch.setattr(sdpa, "cudnn_takes", takes)
    monkeypatch.setattr(sdpa, "only_cudnn", nullcontext)
    assert relative(model(tokens).logits, expected) < 1e-5
    assert len(seen) == 4
    assert all(wide > narrow for wide, narrow in seen)
    # A mask is not causal.
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    model(tokens, attention_mask=mask)
    assert len(seen) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs cuDNN")
@pytest.mark.parametrize("length", [sdpa.LONG, sdpa.LONG + 100])
@torch.no_grad()
def test_cudnn_attends_to_heads_of_two_widths(length: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    parts: Any = [
        torch.randn(1, 2, length, width, device="cuda", dtype=torch.bfloat16, generator=generator)
        for width in (192, 192, 128)
    ]
    if not sdpa.cudnn_takes(*parts):
        pytest.skip("PyTorch does not let cuDNN take these widths")
    with sdpa.only_cudnn():
        found = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
    wide = *parts[:2], torch.nn.functional.pad(parts[2], (0, 64))
    with sdpa.without_cudnn():
        expected = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)[..., :128]
    assert relative(found, expected) < 0.01


def test_short_prompts_and_cpus_are_padded() -> None:
    parts = torch.zeros(1, 2, sdpa.LONG, 24), torch.zeros(1, 2, sdpa.LONG, 24), torch.zeros(1, 2, sdpa.LONG, 16)
    with torch.no_grad():
        assert not sdpa.cudnn_takes(*parts)
