"""Healing on two processes gives the result of one process, and a killed run resumes with the same result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.heal_on_two_processes import ENVIRONMENT, Launch, start_server
from transformers import AutoModelForCausalLM

from transmla.convert.pipeline import convert
from transmla.recipe import Recipe

SIZES = {"length": 32, "batch": 8, "held-out": 4, "max-tokens": 3072, "eval-every": 3, "save-every": 4}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    start_server()


@pytest.fixture
def arguments(pair: tuple[Path, Path], text_file: Path) -> list[str]:
    return [str(pair[1]), "--teacher", str(pair[0]), "--data", str(text_file)]


def heal(kind: str, arguments: list[str], output: Path) -> None:
    Launch(kind, [*arguments, "-o", str(output), *SMALL], output.with_name(f"{output.name}-logs")).wait()


def curve(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "transmla.json").read_text())["healing"][-1]["curve"]


@pytest.mark.parametrize(
    ("precision", "tolerance", "kinds"),
    [("no", 1e-4, ("ddp", "fsdp", "deepspeed")), ("bf16", 0.03, ("fsdp", "deepspeed"))],
)
def test_two_processes_equal_one_process(
    precision: str, tolerance: float, kinds: tuple[str, ...], arguments: list[str], tmp_path: Path
) -> None:
    arguments += ["--precision", precision]
    heal("alone", arguments, tmp_path / "alone")
    for kind in kinds:
        heal(kind, [*arguments, "--accumulate", "2"], tmp_path / kind)
        for point, expected in zip(curve(tmp_path / kind), curve(tmp_path / "alone"), strict=True):
            for value in ("held_out_kl", "loss")[: 1 if expected["step"] == 0 else 2]:
                assert point[value] == pytest.approx(expected[value], rel=tolerance), kind
        if precision == "no":
            one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("alone", kind))
            assert all(torch.allclose(one[name].float(), two[name].float(), rtol=0.02, atol=1e-4) for name in one)


@pytest.mark.parametrize("kind", ["alone", "fsdp", "deepspeed"])
def test_a_killed_run_resumes_with_the_same_curve(kind: str, arguments: list[str], tmp_path: Path) -> None:
    arguments += ["--accumulate", "2", "--precision", "no"]
    heal(kind, arguments, tmp_path / "whole")
    output = tmp_path / "killed"
    run = Launch(kind, [*arguments, "-o", str(output), *SMALL], tmp_path / "logs")
    file, deadline = tmp_path / "killed.partial" / "healing.json", time.monotonic() + 120
    while time.monotonic() < deadline and run.running:
        if file.is_file() and json.loads(file.read_text() or '{"step": 0}')["step"] >= 4:
            break
        time.sleep(0.002)
    run.kill()
    assert not output.exists(), "the run ended before it could be killed"
    assert json.loads(file.read_text())["step"] >= 4, run.log()
    heal(kind, [*arguments, "--resume"], output)
    resumed, expected = ([point["held_out_kl"] for point in curve(tmp_path / name)] for name in ("killed", "whole"))
    assert resumed == expected


@pytest.mark.parametrize(("kind", "form"), [("ddp", "native"), ("fsdp", "transmla"), ("deepspeed", "native")])
def test_a_nan_loss_on_one_process_rolls_all_processes_back(
    kind: str, form: str, arguments: list[str], tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    """FSDP2 runs on an export of the transmla format, whose decoder layers are the family's."""
    if form == "transmla":
        arguments[0] = str(convert(make_recipe(Path(arguments[2]), "transmla", cache_ratio=0.5, format=form)))
    heal(f"{kind}-nan", [*arguments, "--precision", "no"], tmp_path / "healed")
    record = json.loads((tmp_path / "healed" / "transmla.json").read_text())["healing"][-1]
    assert record["rollbacks"] == 1
    assert [point["step"] for point in record["curve"]] == [0, 3, 6, 9, 12]
    assert record["held_out_kl"]["after"] < record["held_out_kl"]["before"]


def test_scripts_healing(make_source: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """``scripts/healing.py`` on a tiny model, without a fit after the conversion."""
    source = make_source(max_position_embeddings=2048)
    script = Path(__file__).parents[2] / "scripts" / "healing.py"
    sizes = ["length=32", "batch=8", "held_out=4", "max_tokens=5120", "warmup=0.1"]
    texts = ["--calibration", "pydoc", "--text", str(text_file), "--data", str(text_file)]
    paths = ["--work", str(tmp_path / "work"), "--result", str(tmp_path / "result.json"), "--device", "cpu"]
    more = ["--budgets", "0.5", "--reconstruct", "off", "--sequences", "2", "--commit", "none", "--windows", "2", "1"]
    command = [sys.executable, str(script), str(source), *texts, *paths, *more, "--settings", *sizes]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["cross_entropy"] for row in rows] == [0.0, 0.1]
    for row in rows:
        assert row["after"]["test KL"] < row["before"]["test KL"]
        assert row["healing"]["held_out_kl"]["after"] < row["healing"]["held_out_kl"]["before"]


def test_scripts_healing_speed(arguments: list[str], tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "healing_speed.py"
    sizes = ["--batch", "8", "--length", "32", "--steps", "20", "--eval-every", "10"]
    sizes += ["--trainable", "attention", "--no-compile"]
    paths = ["--work", str(tmp_path / "work"), "--result", str(tmp_path / "result.json"), "--commit", "none"]
    command = [sys.executable, str(script), *arguments, *sizes, *paths, "--ways", "one", "ddp"]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["held-out KL"] == pytest.approx(two["held-out KL"], rel=1e-3)
    assert one["tokens per second"] > 0
