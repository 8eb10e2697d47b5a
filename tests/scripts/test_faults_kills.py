"""Conversions that are killed anywhere resume to the same bytes, and the script that kills them notices if not."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from transmla import files


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return importlib.import_module("faults_kills")


def test_killed_conversions_resume_to_the_same_bytes(kills: Any) -> None:
    rows = kills.run(8, seed=1, only="convert, off")
    assert [row["faults"] for row in rows] == [[], []]
    assert sum(row["equal"] for row in rows) == 8
    assert sum(row["killed"] for row in rows) >= 5
    assert sum(row["again"] for row in rows) >= 1


def test_a_temporary_file_that_stays_is_noticed(kills: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the deletion of temporary files, kills inside writes leave them in the export."""
    monkeypatch.setattr("transmla.export.workspace.remove_temporaries", lambda _: None)
    monkeypatch.setattr(kills, "KINDS", (kills.KINDS[1],) * 3)
    monkeypatch.setattr(files, "TEMPORARY", "kept-")
    rows = kills.run(6, seed=1, only="convert, off, native")
    assert rows[0]["faults"]
