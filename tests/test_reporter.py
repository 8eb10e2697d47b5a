"""A timed reporter measures stages, and hands all reports on."""

from __future__ import annotations

from typing import Any

import pytest

from transmla import reporter
from transmla.reporter import Silent, Timed


class Recorder(Silent):
    """Keeps all reports."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def stage(self, name: str, total: int) -> None:
        self.seen.append(("stage", name, total))

    def advance(self, done: int, note: str = "") -> None:
        self.seen.append(("advance", done, note))

    def spent(self, phase: str, seconds: float) -> None:
        self.seen.append(("spent", phase, seconds))

    def message(self, text: str) -> None:
        self.seen.append(("message", text))


def test_stages_are_timed_and_reports_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.5, 14.0, 20.0])
    monkeypatch.setattr(reporter.time, "monotonic", lambda: next(clock))
    recorder = Recorder()
    timed = Timed(recorder)
    timed.stage("reading", 3)
    timed.advance(1, "first")
    timed.message("a line")
    timed.stage("fitting", 2)
    timed.spent("observe", 2.0)
    timed.spent("fit", 3.5)
    assert timed.finish() == [
        {"name": "starting", "seconds": 1.5, "phases": {}},
        {"name": "reading", "seconds": 2.5, "phases": {}},
        {"name": "fitting", "seconds": 6.0, "phases": {"observe": 2.0, "fit": 3.5}},
    ]
    assert recorder.seen == [
        ("stage", "reading", 3),
        ("advance", 1, "first"),
        ("message", "a line"),
        ("stage", "fitting", 2),
        ("spent", "observe", 2.0),
        ("spent", "fit", 3.5),
    ]
