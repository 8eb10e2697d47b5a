"""`plan` says that memory or disk are too small, and `convert` refuses before it begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from helpers.command_line import CALIBRATION, Run, refuses

from transmla.convert import memory
from transmla.source import memory as free

OFF = ["--reconstruct", "off", "--heal", "off", "--device", "cpu", *CALIBRATION]


@pytest.fixture
def little_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**8))
    monkeypatch.setattr(free, "_free_in_cgroups", list)
    monkeypatch.setattr(memory, "resident_memory", lambda: 0)


@pytest.mark.usefixtures("little_memory")
def test_too_little_memory(run: Run) -> None:
    says = "the conversion needs about 0.7 GB of memory; 0.1 GB are free; use a computer with more memory"
    code, out, _ = run("plan", "source", *OFF)
    assert code == 0
    assert f"convert refuses this here: {says}" in " ".join(out.split())
    assert json.loads(run("plan", "source", *OFF, "--json")[1])["refused"][0].startswith(says)
    refuses(run, "convert", "source", "-o", "out", *OFF, says=says)


def test_too_little_disk(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    says = "the conversion needs about"
    assert f"convert refuses this here: {says}" in " ".join(run("plan", "source", *OFF)[1].split())
    refuses(run, "convert", "source", "-o", "out", *OFF, says=says)


def test_nothing_is_refused_that_has_room(place: Path, run: Run) -> None:
    assert json.loads(run("plan", "source", *OFF, "--json")[1])["refused"] == []
    assert "refuses" not in run("plan", "source", *OFF)[1]
