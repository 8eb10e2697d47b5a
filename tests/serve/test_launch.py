"""`transmla serve` chooses an installed server, and refuses before it starts what the server cannot serve."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Run

from transmla.errors import TransmlaError
from transmla.serve.launch import SERVING, Server, choose_server


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes only the given modules seem to be installed."""

    def make(*names: str) -> None:
        monkeypatch.setattr(
            "transmla.serve.launch.find_spec",
            lambda name: importlib.util.find_spec("json") if name in names else None,
        )

    return make


def choose(folder: Path, runtime: str = "auto", *extra: str) -> Server:
    return choose_server(folder, runtime, "127.0.0.1", 8000, extra)


def test_transformers_serves_where_vllm_is_missing(installed: Callable[..., None], converted: Path) -> None:
    installed(*SERVING)
    server = choose(converted / "out", "auto", "--device", "cpu")
    assert server.name == "transformers"
    assert server.command[0] == sys.executable
    assert server.command[-7:] == (str(converted / "out"), "--host", "127.0.0.1", "--port", "8000", "--device", "cpu")


def test_a_missing_server_is_refused_with_the_command_that_installs_it(
    installed: Callable[..., None], converted: Path
) -> None:
    installed()
    with pytest.raises(TransmlaError, match=r'pip install "transformers\[serving\]"'):
        choose(converted / "out")
    with pytest.raises(TransmlaError, match="pip install vllm"):
        choose(converted / "out", "vllm")


def test_unknown_runtimes_and_folders_are_refused(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(TransmlaError, match="unknown runtime 'tgi'"):
        choose(converted / "out", "tgi")
    with pytest.raises(TransmlaError, match=r"has no config\.json"):
        choose(tmp_path)


def test_the_command_runs_what_it_prints(
    run: Run, converted: Path, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(*SERVING)
    started: list[Any] = []
    monkeypatch.setattr("os.execv", lambda path, command: started.append((path, command)))
    folder = str(converted / "out")
    code, out, _ = run("serve", folder, "--dry-run")
    assert code == 0
    assert not started
    assert "starting transformers" in out
    run("serve", folder, "--port", "9000", "--", "--device", "cpu")
    path, command = started[0]
    assert path == sys.executable
    assert command[-4:] == ("--port", "9000", "--device", "cpu")
    assert json.loads((converted / "out/config.json").read_text())["model_type"] == "deepseek_v3"
