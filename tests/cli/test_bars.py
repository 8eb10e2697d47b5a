"""Progress where nobody watches a terminal."""

from __future__ import annotations

import contextlib
import re

import pytest

from transmla.cli import bars as module
from transmla.cli.bars import Bars
from transmla.errors import printable


def test_a_line_a_minute_is_printed_off_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with Bars() as bars:
        bars.stage("healing", 610)
        bars.advance(1, "KL [x] 1.25")
        assert capsys.readouterr().err == ""
        for done in (100, 101, 200):
            now += 40
            bars.advance(done, f"KL [x] {done / 100}")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert re.fullmatch(r"healing 101/610, \d+ s(, \d+ \w+ left)?: KL \[x\] 1\.01", lines[0])
        now += 40
        bars.stage("writing", 3)
        bars.advance(1)
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(r"writing 1/3, \d+ s(, \d+ \w+ left)?", line)
    # The bars of all stages stand at the end.
    last = capsys.readouterr().err
    assert "healing" in last
    assert "200/610" in last
    assert "1/3" in last


def test_a_terminal_has_bars_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)
    printed: list[str] = []
    monkeypatch.setattr(module, "plain_line", printed.append)
    bars = Bars()
    bars.stage("healing", 3)
    bars.advance(1)
    assert len(printed) == 1
    monkeypatch.setattr(module.err, "_force_terminal", True)
    bars.advance(2)
    assert len(printed) == 1


@pytest.mark.parametrize("name", ["wiki[en].txt", "wiki[/en].txt", "wiki\x1b[31m.txt"])
def test_a_stage_has_the_name_that_it_was_given(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Bars() as bars:
        bars.stage(f"reading {name}", 1)
        bars.advance(1)
    assert printable(name) in capsys.readouterr().err


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_dumb_terminal_gets_lines(
    term: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)
    monkeypatch.setattr(module.err, "_force_terminal", True)
    monkeypatch.setattr(module.err, "_environ", {"TERM": term})
    with contextlib.suppress(KeyboardInterrupt), Bars() as bars:
        bars.stage("healing", 3)
        bars.advance(1)
        raise KeyboardInterrupt
    lines = capsys.readouterr().err.split("\n")
    assert any(line.startswith("healing 1/3, 0 s") for line in lines) == (term == "dumb")
    # After a failure, its line should stand alone.
    assert any("━" in line for line in lines) == (term == "xterm")


def test_steps_of_minutes_have_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = Bars()
    now = 1000.0
    monkeypatch.setattr(bars.progress, "get_time", lambda: now)
    bars.stage("converting layers", 30)
    for done in (1, 2, 3):
        now += 100
        bars.advance(done)
    assert bars.progress.tasks[0].time_remaining == 2700
