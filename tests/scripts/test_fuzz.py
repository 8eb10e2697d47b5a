"""scripts/fuzz.py: faults that were found stay mended, and a few new cases of every input end in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Cases of every input that are drawn; a thousand take minutes.
DRAWN = 2
QUICK = ("plan", "recipe-plan", "eval", "convert")
# Bases that a light run builds: no healing and no conversion.
LIGHT = ("config", "index", "headers", "recipes", "tokenizers")


@pytest.fixture(scope="module")
def fuzz(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("fuzz")


def test_mended_faults_stay_mended(fuzz: ModuleType, sources: Path) -> None:
    cases = [json.loads(line) for line in fuzz.SEEDS.read_text().splitlines()]
    quick = [case for case in cases if (sources / case["base"]).is_dir() and case["verb"] in QUICK]
    assert len(quick) >= 10
    found = {json.dumps(case)[:300]: fuzz.fuzz_run.run_case(case, sources) for case in quick[:40]}
    assert {case: text for case, (outcome, text) in found.items() if outcome in fuzz.FAULTS} == {}


def test_drawn_cases_are_refused_or_accepted(fuzz: ModuleType, sources: Path) -> None:
    tally = fuzz.Tally(sources, None)
    fuzz.draw(tally, list(LIGHT), DRAWN * len(LIGHT), seed=7, light=True)
    assert tally.faults == {}
    assert sum(counts.total() for counts in tally.counts.values()) >= len(LIGHT)
    assert not list((sources / "runs").iterdir())


def test_a_fault_is_counted(fuzz: ModuleType, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: list[str]) -> int:
        raise AssertionError("planted")

    case = {"input": "config", "base": "llama", "verb": "plan", "edits": []}
    assert fuzz.fuzz_run.run_case(case, sources)[0] == "accepted"
    monkeypatch.setattr(fuzz.fuzz_run, "call", fail)
    assert fuzz.fuzz_run.run_case(case, sources)[0] == "traceback"
    shutil.rmtree(sources / "runs")
    (sources / "runs").mkdir()
