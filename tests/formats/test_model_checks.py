"""The check of absorbed decoding tells rounding from a wrong model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.mla_models import tiny

from transmla.formats import model_checks
from transmla.formats.model_checks import Check, absorbed_decoding, beyond_rounding, relative_difference

TOKENS = torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(0))


def model_with_large_scores(family: str) -> Any:
    """Return a float32 model whose scores are so large that absorbed decoding rounds by more than the tolerance."""
    model = tiny(family, num_hidden_layers=3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.weight.mul_(SCALES[family])
    return model


SCALES = {"deepseek_v3": 3000.0, "minicpm3": 20000.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SCALES)
def test_a_right_model_that_rounds_is_judged_in_float64(family: str, dtype: torch.dtype) -> None:
    model = model_with_large_scores(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    tables = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = getattr(model.config, "_experts_implementation", None)
    check = absorbed_decoding(model, TOKENS)
    assert check.passed, check.detail
    assert check.detail.endswith("in float64")
    # The model is as before, but accelerated.
    assert model.dtype == dtype
    assert all(torch.equal(table, tables[name]) for name, table in model.named_buffers())
    assert all(table.dtype == tables[name].dtype for name, table in model.named_buffers())
    assert getattr(model.config, "_experts_implementation", None) == experts
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", SCALES)
def test_a_wrong_model_fails_in_float64_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorbed decoding reads a value row that is 0.1 % larger than that of the full forward pass."""
    accelerate = model_checks.accelerate

    def damage(model: Any, **options: Any) -> None:
        accelerate(model, **options)
        model.model.layers[1].self_attn.kv_b_proj.weight[-1].mul_(1.001)

    monkeypatch.setattr(model_checks, "accelerate", damage)
    check = absorbed_decoding(model_with_large_scores(family), TOKENS)
    assert not check.passed, check.detail
    assert check.detail.endswith("in float64")


def test_norms_are_exact_in_the_comparison_in_float64() -> None:
    """Norms of transformers round to float32 otherwise, and massive activations magnify that."""
    model, rows = tiny(num_hidden_layers=3), torch.randn(4, 48, dtype=torch.float64)

    def compare() -> Check:
        norm = model.model.norm
        exact = norm.weight.double() * rows * (rows.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        difference = relative_difference(norm(rows.to(model.dtype)).detach(), exact.detach())
        return Check("norm", difference < 1e-14, f"{difference:.1e}")

    check = beyond_rounding(model, compare)
    assert check.passed, check.detail


def test_a_model_that_passes_in_float32_is_not_judged_again() -> None:
    check = absorbed_decoding(tiny(num_hidden_layers=3), TOKENS)
    assert check.passed
    assert "float64" not in check.detail
