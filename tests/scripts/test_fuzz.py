"""scripts/fuzz.py: faults that were found stay mended, and a few new cases of every input end in one line."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Cases of every input that are drawn; a thousand take minutes.
DRAWN = 2
QUICK = ("plan", "recipe-plan", "eval", "convert")
# Bases that a light run builds: no healing and no conversion.
LIGHT = ("config", "index", "headers", "recipes", "tokenizers")


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    """The script as a module. The variables that it sets do not outlive these tests."""
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("fuzz")


@pytest.fixture(scope="module")
def root(fuzz: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the bases that need no conversion."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "runs").mkdir()
    fuzz.fuzz_run.preload()
    fuzz.fuzz_run.build_sources(folder)
    return folder


def test_mended_faults_stay_mended(fuzz: ModuleType, root: Path) -> None:
    cases = [json.loads(line) for line in fuzz.SEEDS.read_text().splitlines()]
    quick = [case for case in cases if (root / case["base"]).is_dir() and case["verb"] in QUICK]
    assert len(quick) >= 10
    found = {json.dumps(case)[:300]: fuzz.fuzz_run.run_case(case, root) for case in quick[:40]}
    assert {case: text for case, (outcome, text) in found.items() if outcome in fuzz.FAULTS} == {}


def test_drawn_cases_are_refused_or_accepted(fuzz: ModuleType, root: Path) -> None:
    tally = fuzz.Tally(root, None)
    fuzz.draw(tally, list(LIGHT), DRAWN * len(LIGHT), seed=7, light=True)
    assert tally.faults == {}
    assert sum(counts.total() for counts in tally.counts.values()) >= len(LIGHT)
    assert not list((root / "runs").iterdir())


def test_a_fault_is_counted(fuzz: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: list[str]) -> int:
        raise AssertionError("planted")

    case = {"input": "config", "base": "llama", "verb": "plan", "edits": []}
    assert fuzz.fuzz_run.run_case(case, root)[0] == "accepted"
    monkeypatch.setattr(fuzz.fuzz_run, "call", fail)
    assert fuzz.fuzz_run.run_case(case, root)[0] == "traceback"
    shutil.rmtree(root / "runs")
    (root / "runs").mkdir()
