"""The model card: its examples run, and it says whether the model was evaluated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_examples_of_the_card_run(
    converted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(converted)
    first, second = code_blocks((converted / "out" / "README.md").read_text())
    assert "model.generate(" in first
    exec(first)
    assert capsys.readouterr().out.strip()
    # The second block stands in the place of one line of the first.
    assert "transmla.load(path" in second
    line = next(line for line in first.splitlines() if line.startswith("model = "))
    exec(first.replace(line, second))
    assert capsys.readouterr().out.strip()


def test_a_card_without_an_evaluation_names_the_command(converted: Path) -> None:
    card = (converted / "out" / "README.md").read_text()
    assert "not evaluated: run `transmla eval out --baseline source`" in card
