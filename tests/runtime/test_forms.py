"""The form of attention follows from products and rates, and does not change what is computed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.graph_models import with_graphs
from helpers.mla_models import prompt, tiny
from transformers import DynamicCache

import transmla
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime import forms
from transmla.runtime.forms import RATES, Rates, absorbing_is_cheaper, crossover, expanding_is_cheaper, most_absorbed
from transmla.runtime.latent_attention import LatentAttention

# Rates under which the form with fewer products is chosen.
COUNTED = Rates(absorbed=1.0, rebuild=1.0, attend=1.0, most=128)


def shape(rank: int = 512, nope: int = 128, rope: int = 64, value: int = 128) -> Any:
    """Return the widths of an attention layer; by default, those of DeepSeek-V3."""
    return SimpleNamespace(kv_lora_rank=rank, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value)


def test_equal_rates_count_products() -> None:
    assert round(crossover(shape(), COUNTED)) == 171
    assert crossover(shape(), replace(COUNTED, absorbed=7.0, rebuild=7.0, attend=7.0)) == pytest.approx(
        170.67, abs=0.01
    )


def test_the_expanded_form_needs_to_save_something_for_each_new_token() -> None:
    assert crossover(shape(rank=128), COUNTED) == float("inf")
    assert crossover(shape(rank=96), COUNTED) == float("inf")
    # Where attention to keys and values is the faster one, it saves time without saving products.
    assert crossover(shape(rank=128), replace(COUNTED, attend=2.0)) < float("inf")


@pytest.mark.parametrize("rank", [16, 96, 128, 192, 512])
def test_the_crossover_follows_each_rate(rank: int) -> None:
    def at(**rates: float) -> float:
        return crossover(shape(rank=rank), replace(COUNTED, attend=1.5, **rates))

    faster = (1.0, 1.1, 1.3, 2.0, 8.0)
    by_absorbed = [at(absorbed=rate) for rate in faster]
    by_rebuild = [at(rebuild=rate) for rate in faster]
    by_attend = [crossover(shape(rank=rank), replace(COUNTED, attend=rate)) for rate in faster]
    assert by_absorbed == sorted(by_absorbed)
    assert by_rebuild == sorted(by_rebuild, reverse=True)
    assert by_attend == sorted(by_attend, reverse=True)


def test_steps_are_absorbed_up_to_the_crossover_and_the_largest_measured_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(RATES, "cpu", replace(COUNTED, most=300))
    monkeypatch.setitem(RATES, "cuda", replace(COUNTED, rebuild=1000.0))
    assert most_absorbed(shape(), "cpu") == 170
    assert most_absorbed(shape(rank=128), "cpu") == 300
    assert most_absorbed(shape(), "other") == 170
    # A step of one token is always absorbed.
    assert most_absorbed(shape(), "cuda") == 1

    def absorbs(new: int, total: int = 10**4, masked: bool = True) -> bool:
        return absorbing_is_cheaper(shape(), torch.empty(1, 1, new, 1), total, torch.ones(1) if masked else None)

    assert [absorbs(new) for new in (1, 2, 170, 171)] == [True, True, True, False]
    # Without a mask, or without tokens before them, several new tokens are a prompt.
    assert not absorbs(2, masked=False)
    assert not absorbs(20, total=20)
    assert absorbs(1, total=1, masked=False)


def test_few_queries_attend_to_the_prefix_in_absorbed_form() -> None:
    assert not expanding_is_cheaper(shape(), 32)
    assert expanding_is_cheaper(shape(), 64)
    # The expanded form saves no product.
    assert not expanding_is_cheaper(shape(rank=96), 10**6)


def test_both_forms_give_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = transmla.accelerate(tiny(first_k_dense_replace=2), cuda_graphs=False), prompt(0)["input_ids"]
    found = {}
    for most in (1, 128):
        monkeypatch.setitem(forms.RATES, "cpu", replace(COUNTED, most=most))
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens[:, :12], **{CACHE_ARGUMENT: cache})
            logits = model(tokens[:, 12:17], **{CACHE_ARGUMENT: cache}).logits
        (form,) = {layer.form for layer in model.modules() if isinstance(layer, LatentAttention)}
        found[form] = logits
    assert {*found} == {"absorbed", "expanded"}
    assert torch.allclose(*found.values(), atol=1e-4)


def test_captured_steps_have_the_same_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forms.RATES, "cpu", replace(COUNTED, most=3))
    model, tokens = transmla.accelerate(tiny(first_k_dense_replace=2)), prompt(0)["input_ids"]
    graphs, cache = with_graphs(model), DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :8], **{CACHE_ARGUMENT: cache})
        for start, new, form in ((8, 3, "absorbed"), (11, 4, "expanded"), (15, 1, "absorbed")):
            model(tokens[:, start : start + new], **{CACHE_ARGUMENT: cache})
            assert {layer.form for layer in model.modules() if isinstance(layer, LatentAttention)} == {form}
            assert (graphs.reason is not None) == (start >= 11)
    assert graphs.reason == "the expanded form costs less"
