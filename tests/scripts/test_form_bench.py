"""scripts/form_bench.py times forms of attention that compute the same output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_all_forms_are_timed_and_agree(
    load_script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    script, result = load_script("form_bench"), tmp_path / "result.json"
    monkeypatch.setattr(script, "FULL_TOKENS", 64)
    options = ["--shapes", "tiny", "--batch", "2", "--context", "64", "--new", "1", "3", "40", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["form_bench.py", *options, "--result", str(result), "--commit", "abc"])
    script.main()
    rows = json.loads(result.read_text())["rows"]
    timed = [row for row in rows if "microseconds" in row]
    counted = {form: sum(row["form"] == form for row in timed) for form in (*script.FORMS, "rebuild", "attend")}
    assert counted == {"absorbed": 3, "rebuilt": 3, "groups": 3, "rebuild": 1, "attend": 3}
    assert all(row["error"] < 0.02 for row in timed if row["form"] in ("rebuilt", "groups"))
    # Bytes of bfloat16: r + d_r for latents; for each of two groups, a key of 16 values and a padded value.
    assert {row["cache bytes"] for row in timed if row["form"] == "groups"} == {2 * 2 * 32}
    assert {row["cache bytes"] for row in timed if row["form"] != "groups"} == {2 * 24}
    # Only 40 tokens of 4 heads are enough queries.
    assert {row["rate of"]: row["points"] for row in rows if "rate of" in row} == {
        "absorbed": 1, "rebuild": 1, "attend": 1, "groups": 1,
    }  # fmt: skip
    assert "40" in capsys.readouterr().out


def test_points_behind_the_time_limit_are_left_out(
    load_script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    script, result = load_script("form_bench"), tmp_path / "result.json"
    arguments = ["form_bench.py", "--shapes", "tiny", "--seconds", "0", "--device", "cpu", "--result", str(result)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--commit", "abc"])
    script.main()
    assert json.loads(result.read_text())["rows"] == []
    assert "tiny: no time for batch 8, context 16384, 1 new tokens" in capsys.readouterr().out
