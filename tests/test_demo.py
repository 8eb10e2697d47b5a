"""The README's first command on a real trained model, shortened: it runs, and the default beats the baseline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from transmla.after import evaluate_export
from transmla.pipeline import convert
from transmla.progress import Silent
from transmla.recipe import read_recipe
from transmla.verify import verify

ROOT = Path(__file__).parents[1]
RECIPE = "recipes/smollm2-135m.yaml"


@pytest.fixture(scope="module")
def divergence(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """KL to the source on held-out text, by method, after a conversion with little calibration text."""
    found = {}
    torch.set_num_threads(2)
    for method in ("calibrated", "transmla"):
        changes = {
            "output": str(tmp_path_factory.mktemp("demo") / method),
            "method": method,
            "reconstruct": "off",
            "device": "cpu",
            "calibration": {"sequences": 16, "length": 256},
            "eval": {"window": 512, "max_windows": 2},
        }
        recipe = read_recipe(ROOT / RECIPE, changes)
        folder = convert(recipe)
        found[method] = evaluate_export(folder, recipe, Silent())["kl"]
        assert all(check.passed for check in verify(folder))
    torch.set_num_threads(1)
    return found


def test_the_readme_names_the_recipe() -> None:
    assert f"transmla convert {RECIPE}" in (ROOT / "README.md").read_text()


def test_the_demo_model_survives(divergence: dict[str, float]) -> None:
    assert 0 < divergence["calibrated"] < 0.4


def test_the_default_beats_the_baseline_clearly(divergence: dict[str, float]) -> None:
    assert divergence["calibrated"] < 0.7 * divergence["transmla"]
