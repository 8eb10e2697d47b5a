"""scripts/faults.py prints both tables, and ends with 1 if a fault was missed; its parts have tests of their own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("faults")


@pytest.mark.parametrize(("caught", "equal"), [(True, 3), (False, 3), (True, 2)])
def test_both_tables_are_printed_and_misses_end_with_1(
    caught: bool,
    equal: int,
    faults: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    wrong = ["other bytes"] * (3 - equal)
    row = {"job": "convert, off", "runs": 3, "killed": 2, "equal": equal, "faults": wrong}
    asked: list[Any] = []
    monkeypatch.setattr(
        faults.faults_planted, "run", lambda *a, **k: asked.append((a, k)) or [("llama: a head × 1.02", False, caught)]
    )
    monkeypatch.setattr(faults.faults_kills, "run", lambda *a: asked.append(a) or [row])
    code = faults.main(
        ["--planted", "5", "--kills", "3", "--seed", "4", "--json", str(tmp_path / "f.json"), "--commit", "abc"]
    )
    assert code == int(not caught or equal < 3)
    assert asked == [((5,), {"seed": 4}), (3, 4)]
    printed = capsys.readouterr().out
    assert f"| llama | 1 | 0 | {int(caught)} |" in printed
    assert f"| convert, off | 3 | 2 | {equal} |" in printed
    assert ("not caught by verify --source: llama: a head × 1.02" in printed) == (not caught)
    assert ("convert, off: other bytes" in printed) == (equal < 3)
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["provenance"]["commit"] == "abc"
    assert written["rows"][0]["kills"] == [row]
