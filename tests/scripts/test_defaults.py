"""scripts/defaults.py measures a default conversion on given texts and on two test splits, and records it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from transmla.convert import prepare
from transmla.plan import fit_settings


def test_the_table_is_measured_and_recorded(
    make_source: Callable[..., Path], text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    script = importlib.import_module("defaults")
    monkeypatch.setitem(prepare.AMOUNTS, "cpu", (12, 64))
    short = fit_settings.FitSettings(steps=3, tokens=128, rate=1e-3, through_mlp=False)
    monkeypatch.setitem(fit_settings.FITS, "fast", short)
    source, result = make_source(num_hidden_layers=3, max_position_embeddings=256), tmp_path / "result.json"
    options = {
        "--name": "tiny",
        "--text": f"words:{text_file}",
        "--work": str(tmp_path / "work"),
        "--result": str(result),
    }
    options |= {"--windows": "2", "--window": "64", "--device": "cpu", "--commit": "abc"}
    arguments = [part for option in options.items() for part in option]
    monkeypatch.setattr(sys, "argv", ["defaults.py", str(source), "--budgets", "0.5", *arguments])
    script.main()
    recorded = json.loads(result.read_text())
    assert recorded["provenance"]["commit"] == "abc"
    (row,) = recorded["rows"]
    assert row["budget"] == 0.5
    scores = row["export"]["texts"]
    assert [score["text"] for score in scores] == ["words", "pydoc", "stdlib"]
    assert row["export"]["mean KL"] == pytest.approx(sum(score["kl"] for score in scores) / 3)
    # A CPU does not heal, so there is no export before the healing.
    assert "before healing" not in row
    assert "converting layers" in [stage for _, stage in row["stages"]]
    rotary, latent = map(int, row["rotary + latent"].split(" + "))
    assert 0 < rotary + latent <= 48  # half of the source's 96
