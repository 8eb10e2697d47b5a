"""scripts/faults_environment.py: a few of its cases, and the judgement of how a command ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from helpers.forked import Ended

# Cases that need no export and no other user, and take a fraction of a second.
QUICK = ("output 'a\\nb'", "output '/proc/x'", "source '/dev/zero'", "source 'package:../x'", "text 'a*.txt'",
         "recipe is a pipe", "config is a folder", "pointer for a GGUF", "families, stdout full", "plan, stdout broken",
         "a refusal, stderr missing", "plan, ascii", "plan, no working folder", "eval, 8 open files")  # fmt: skip


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("faults_environment")


def test_commands_end_well_or_in_one_line(script: ModuleType, sources: Path) -> None:
    chosen = [case for case in script.cases(sources) if case.name in QUICK]
    assert sorted(case.name for case in chosen) == sorted(QUICK)
    found = script.run_all(sources, iter(chosen))
    assert sum(row["passed"] for row in found.values()) == len(QUICK)
    assert not list((sources / "runs").iterdir())


def test_names_are_unique(script: ModuleType, sources: Path) -> None:
    names = [(case.kind, case.name) for case in script.cases(sources)]
    assert len(names) == len(set(names)) >= 150


@pytest.mark.parametrize(
    ("code", "text", "silent", "good"),
    [
        (0, "done", False, True),
        (2, "error: no folder", False, True),
        (2, "", False, False),
        (2, "", True, True),
        (2, "error: a\nerror: b", False, False),
        (0, "Traceback (most recent call last)", True, False),
        (2, "error: a\nException ignored in", False, False),
        (-9, "", False, False),
        (3, "error: a", False, False),
    ],
)
def test_the_judgement(script: ModuleType, code: int, text: str, silent: bool, good: bool) -> None:
    case = script.Case("kind", "name", (), silent=silent)
    assert script.passes(case, Ended(code, text)) == good
