"""The model card: its examples run, and it says whether the model was evaluated."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from transmla.export.card import write_card
from transmla.export.manifest import Manifest
from transmla.formats.base import format_named
from transmla.recipe import read_recipe


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


def test_the_curve_stands_below_the_healing_that_it_shows(converted: Path, tmp_path: Path) -> None:
    folder = converted / "out"
    healing = {
        "settings": {"teacher": "source", "data": ["text.txt"], "trainable": "attention"},
        "tokens": 100,
        "seconds": 60,
        "held_out_kl": {"before": 2.0, "after": 1.0},
    }
    # Equal records: two healings may have had the same settings and results.
    manifest = replace(Manifest.read(folder), healing=[healing, healing])
    (tmp_path / "healing.png").touch()
    words = format_named(manifest.format).card_words(manifest.plan.spec)
    write_card(tmp_path, manifest, read_recipe(folder / "recipe.yaml", {}), words)
    first, second = (tmp_path / "README.md").read_text().split("## Healing")[1:]
    assert "healing.png" not in first
    assert "healing.png" in second
