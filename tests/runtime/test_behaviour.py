"""Accelerated models give the logits of stock ones over every cache, attention implementation and padding.

``scripts/behaviour_matrix.py`` tries all combinations; this is the part that runs in seconds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.behaviour import ALL_FAMILIES, CACHES, logits_by_step, relative, stock_model

import transmla

# Largest relative difference in float32.
ROUNDING = 2e-5
# (attention implementation, cache, padding). The last row is the first again: switching leaves nothing behind.
CELLS = (
    ("latent_attention", "dynamic", "left"),
    ("latent_attention", "dynamic", "right"),
    ("latent_attention", "static", "left"),
    ("latent_attention", "static", "right"),
    ("latent_attention", "static, just fitting", "unmasked"),
    ("eager", "dynamic", "left"),
    ("eager", "static", "right"),
    ("sdpa", "static", "unmasked"),
    ("latent_attention", "dynamic, without config", "left"),
)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_logits_equal_the_stock_model(family: str, tmp_path: Path) -> None:
    model = stock_model(family, tmp_path)
    model.set_attn_implementation("eager")
    expected = {
        padding: logits_by_step(model, CACHES["dynamic"](model.config), padding) for padding in {c[2] for c in CELLS}
    }
    if model._supports_sdpa:
        # transformers 5.17 ignores the soft-cap of Gemma 2 here.
        model.set_attn_implementation("sdpa")
        expected["sdpa"] = logits_by_step(model, CACHES["dynamic"](model.config), "unmasked")
    transmla.accelerate(model)
    wrong = {}
    for implementation, cache, padding in CELLS:
        if implementation == "sdpa" and not model._supports_sdpa:
            with pytest.raises(ValueError, match="does not support an attention implementation"):
                model.set_attn_implementation(implementation)
            continue
        model.set_attn_implementation(implementation)
        actual = logits_by_step(model, CACHES[cache](model.config), padding)
        difference = relative(actual, expected["sdpa" if implementation == "sdpa" else padding])
        if not difference < ROUNDING:
            wrong[implementation, cache, padding] = difference
    assert wrong == {}
