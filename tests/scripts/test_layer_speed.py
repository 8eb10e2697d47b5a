"""scripts/layer_speed.py converts sources with real sizes of a layer, and divides the time among phases."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_time_is_given_by_phase_and_layer(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script, result = load_script("layer_speed"), tmp_path / "result.json"
    options = ["--layers", "3", "--sequences", "4", "--length", "32", "--reconstruct", "fast", "--device", "cpu"]
    files = ["--result", str(result), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["layer_speed.py", "tiny", "tiny-gemma2", "tiny-moe", *options, *files])
    script.main()
    rows = json.loads(result.read_text())["rows"]
    assert [(row["model"], row["layers"], row["calibration"]) for row in rows] == [
        ("tiny", 3, "4 x 32"),
        ("tiny-gemma2", 3, "4 x 32"),
        ("tiny-moe", 3, "4 x 32"),
    ]
    for row in rows:
        phases = row["seconds by layer"]
        assert list(phases) == ["read", "observe", "factorise", "fit", "write"]
        assert phases["fit"] > 0
        assert row["estimated seconds a layer"] > 0
        assert row["estimated GiB"] > 0
        assert sum(phases.values()) <= row["seconds a layer"] + 0.05


def test_one_process_of_two_does_its_share_alone(tmp_path: Path) -> None:
    scripts, result = Path(__file__).parents[2] / "scripts", tmp_path / "result.json"
    share = [sys.executable, str(scripts / "one_of_many.py"), "2", str(scripts / "layer_speed.py"), "tiny"]
    options = ["--layers", "3", "--sequences", "4", "--length", "32", "--reconstruct", "fast", "--device", "cpu"]
    subprocess.run([*share, *options, "--result", str(result), "--commit", "abc"], check=True, timeout=300)
    (row,) = json.loads(result.read_text())["rows"]
    assert row["processes"] == 2
    assert row["seconds by layer"]["fit"] > 0
