"""Accelerated models give the logits of stock ones over every cache, attention implementation and padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.behaviour import ALL_FAMILIES, CACHES, IMPLEMENTATIONS, PADDINGS, logits_by_step, relative, stock_model

import transmla

# Rounding of float32 over the layers of a random model.
ROUNDING = 2e-5


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, Any]]:
    """Return an accelerated model, and the logits of its stock twin under eager attention, by padding."""
    model = stock_model(request.param, tmp_path_factory.mktemp(request.param))
    model.set_attn_implementation("eager")
    expected = {padding: logits_by_step(model, CACHES["dynamic"](model.config), padding) for padding in PADDINGS}
    return transmla.accelerate(model), request.param, expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_equal_the_stock_model(models: tuple[Any, Any, dict[str, Any]], implementation: str) -> None:
    model, _, expected = models
    try:
        model.set_attn_implementation(implementation)
    except ValueError as error:  # transformers refuses SDPA for families with soft-caps and sinks
        assert implementation in ("sdpa",)
        assert "does not support an attention implementation" in str(error)
        return
    for cache, make in CACHES.items():
        for padding in PADDINGS:
            difference = relative(logits_by_step(model, make(model.config), padding), expected[padding])
            assert difference < ROUNDING, f"{cache}, padding {padding}: {difference:.1e}"
