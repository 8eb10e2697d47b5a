"""Commands on a terminal, where progress bars are drawn while work goes on."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.conversions import write_text
from helpers.tiny_sources import build_model, build_tokenizer

# Seconds after which a command counts as hanging.
LIMIT = 120


def on_a_terminal(arguments: Sequence[str], interrupt_at: str | None = None) -> tuple[int, str]:
    """Run transmla on a pseudo-terminal, and return its exit code and what the terminal shows.

    Args:
        arguments: the command line.
        interrupt_at: press Ctrl-C once this text was shown.
    """
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "transmla", *arguments]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    child = subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment,
        start_new_session=True,
        # A shell's background job ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(terminal)
    timer = threading.Timer(LIMIT, child.kill)
    timer.start()
    shown = b""
    try:
        while part := read(controller):
            shown += part
            if interrupt_at is not None and interrupt_at.encode() in shown:
                child.send_signal(signal.SIGINT)
                interrupt_at = None
        return child.wait(), shown.decode(errors="replace")
    finally:
        timer.cancel()
        os.close(controller)


def read(controller: int) -> bytes:
    """Return what was written to a terminal; nothing once its last writer has ended."""
    try:
        return os.read(controller, 4096)
    except OSError:
        return b""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    build_model("llama", num_hidden_layers=3).save_pretrained(folder / "source")
    build_tokenizer(folder / "source")
    write_text(folder / "text.txt")
    return folder


def convert(source: Path, name: str) -> list[str]:
    text = ["--calibration", str(source / "text.txt"), "--calibration-sequences", "4", "--calibration-length", "32"]
    return ["convert", str(source / "source"), "--output", str(source / name), *text, "--heal", "off"]


def test_a_conversion_draws_bars_and_ends(source: Path) -> None:
    code, shown = on_a_terminal(convert(source, "out"))
    assert code == 0, shown
    assert "converting layers" in shown
    assert "next: transmla verify" in re.sub(r"\s+", " ", shown)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is visible again
    code, shown = on_a_terminal(["eval", str(source / "out"), "--text", str(source / "text.txt"), "--window", "32"])
    assert code == 0, shown
    assert "perplexity" in shown


def test_ctrl_c_ends_a_conversion(source: Path) -> None:
    code, shown = on_a_terminal(convert(source, "stopped"), interrupt_at="converting layers")
    assert code == 130, shown
    assert "Traceback" not in shown
    assert not (source / "stopped").exists()
