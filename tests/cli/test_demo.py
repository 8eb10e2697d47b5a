"""The README's first command on a real trained model, shortened: it runs, and the default beats the baseline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from transmla.convert.pipeline import convert
from transmla.evaluate.compare import evaluate_models
from transmla.evaluate.verify import verify
from transmla.plan.fit_settings import FITS
from transmla.recipe import read_recipe
from transmla.reporter import Silent

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/smollm2-135m.yaml"


# A tenth of the steps on a quarter of the tokens. At the rate of a whole fit, so few steps fail and are tried again.
SHORT_FIT = {"steps": 6, "tokens": 512, "rate": 1e-3}
# (method, reconstruct)
CONVERSIONS = {"closed": ("calibrated", "off"), "baseline": ("transmla", "off"), "fitted": ("calibrated", "fast")}


@pytest.fixture(scope="module")
def divergence(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """KL to the source on held-out text after conversions with little calibration text, all of one shape."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FITS, "fast", replace(FITS["fast"], **SHORT_FIT))
        for name, (method, reconstruct) in CONVERSIONS.items():
            changes = {
                "output": str(tmp_path_factory.mktemp("demo") / name),
                "method": method,
                "reconstruct": reconstruct,
                "cache_ratio": None,
                "qk_rope_head_dim": 32,
                "kv_lora_rank": 160,
                "device": "cpu",
                "calibration": {"sequences": 8, "length": 256},
                "eval": {"window": 256, "max_windows": 2},
            }
            recipe = read_recipe(ROOT / RECIPE, changes)
            folder = convert(recipe)
            assert recipe.eval is not None
            # In float32: CPUs without instructions for bfloat16 need five times as long for bfloat16.
            result = evaluate_models(
                str(folder), recipe.source, recipe.eval, dtype="float32", device="cpu", reporter=Silent()
            )
            found[name] = result["mean"]["kl"]
        assert all(check.passed for check in verify(folder))
    return found


def test_the_readme_names_the_recipe() -> None:
    assert f"transmla convert {RECIPE}" in (ROOT / "README.md").read_text()


def test_the_demo_model_survives(divergence: dict[str, float]) -> None:
    assert 0 < divergence["fitted"] < 0.4


def test_the_closed_form_beats_the_baseline_clearly(divergence: dict[str, float]) -> None:
    assert divergence["closed"] < 0.7 * divergence["baseline"]


def test_reconstruction_pays_on_a_trained_model(divergence: dict[str, float]) -> None:
    assert divergence["fitted"] < 0.9 * divergence["closed"]
