"""scripts/faults_planted.py: a sample of its faults is caught, and an intact export is not."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Faults that are planted; all take minutes.
PLANTED = 16
# One export of each format.
EXPORTS = ("llama native", "qwen3")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module. The variables that it sets do not outlive these tests."""
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("faults_planted")


def test_planted_faults_are_caught(script: ModuleType) -> None:
    rows = script.run(PLANTED, EXPORTS, seed=5)
    assert len(rows) == PLANTED
    assert [name for name, _, by_source in rows if not by_source] == []
    assert sum(by_verify for _, by_verify, _ in rows) >= 0.9 * PLANTED
    assert f"| all | {PLANTED} |" in script.table(rows)


def test_there_are_faults_of_every_kind_in_every_export(script: ModuleType, tmp_path: Path) -> None:
    planted = script.build("gpt_oss", tmp_path / "base")
    assert script.verdict(planted.export, planted.source) == (False, False)
    assert script.verdict(planted.export, planted.stranger) == (False, True)
    faults = dict(script.changes(planted.export, planted.source, planted.sibling))
    words = ("one head", "zero", "permuted", "swapped", "reset", "another conversion", "sliding_window", "layer_types")
    words += ("inv_freq", "hidden_act", "eos_token_id", "dtype", "token ids", "template", "code", "healing", "sinks")
    assert [word for word in words if not any(word in fault for fault in faults)] == []
    assert len(faults) >= 60
