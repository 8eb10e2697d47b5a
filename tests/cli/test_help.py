"""Help names every option, and every setting of a recipe has a flag."""

from __future__ import annotations

import re
from inspect import signature

import pytest
from helpers.command_line import Run
from pydantic import BaseModel

from transmla import cli
from transmla.cli.options import overrides
from transmla.heal.settings import Healing
from transmla.recipe import Calibration, Evaluation, Recipe
from transmla.registry import scan


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("plan", ["--cache-ratio", "--pad-for", "--json"]),
        ("convert", ["--output", "--resume", "--kv-lora-rank", "--calibration-length", "--allow-pickle"]),
        ("inspect", ["--report", "--calibration", "--method", "--json"]),
        ("verify", ["--source", "--dtype", "--device"]),
        ("eval", ["--baseline", "--text", "--window", "--stride", "--report", "--json"]),
        ("push", ["--private", "--revision", "--dry-run"]),
    ],
)
def test_help_names_every_option(run: Run, verb: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert all(option in out for option in options)
    assert verb in cli.VERBS


@pytest.mark.parametrize(
    ("verb", "models"),
    [
        ("plan", {"": Recipe, "calibration": Calibration}),
        ("inspect", {"": Recipe, "calibration": Calibration}),
        ("convert", {"": Recipe, "calibration": Calibration, "eval": Evaluation}),
        ("eval", {"": Evaluation}),
        ("heal", {"": Healing}),
    ],
)
def test_every_field_has_a_flag(verb: str, models: dict[str, type[BaseModel]]) -> None:
    """A setting that only a recipe file could name would be hidden from ``--help``."""
    flags = set(signature(cli.VERBS[verb]).parameters)
    # Arguments under another name, and sections, whose fields are looked up themselves. Only convert writes a folder.
    elsewhere = {"source": "source", "student": "folder", "calibration": "calibration", "eval": "source"}
    elsewhere |= {} if verb in ("convert", "heal") else {"output": "source"}
    for prefix, model in models.items():
        for field in model.model_fields:
            main = {"calibration": "source", "eval": "text"}.get(prefix) == field
            name = prefix if main else "_".join(part for part in (prefix, field) if part)
            assert (elsewhere.get(name, name) if not prefix else name) in flags, f"{verb} has no flag for {name}"


def test_flags_of_a_section_nest_like_the_file(run: Run) -> None:
    given = overrides({"eval": "pydoc", "eval_window": 64, "calibration_length": 8, "seed": 0, "layers": None})
    assert given == {"eval": {"text": "pydoc", "window": 64}, "calibration": {"length": 8}, "seed": 0}


def test_help_lists_the_formats(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = run("plan", "--help")[1]
    assert all(f"{form.name}: {form.summary[:40]}" in out for form in scan("transmla.formats", "FORMAT").values())


def test_help_shows_types_choices_defaults_and_methods(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = run("convert", "--help")[1]
    assert re.search(r"--kv-lora-rank +<int>", out)
    assert re.search(r"--cache-ratio +<str>", out)
    assert re.search(r"--pad-for .*\(vllm\)", out)
    assert re.search(r"--dtype .*\(auto, bfloat16, float32\) \(default: auto\)", out)
    assert re.search(r"--seed .*\(default: 0\)", out)
    assert all(f"{m.name}: {m.summary[:40]}" in out for m in scan("transmla.core.methods", "METHOD").values())


def test_without_a_verb_the_help_is_shown(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert all(verb in out for verb in cli.VERBS)
    assert run("--version")[1].startswith("transmla ")
