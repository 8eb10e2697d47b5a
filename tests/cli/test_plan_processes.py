"""`plan --processes`: what several processes need, as `convert` counts it, and the command that starts them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import CALIBRATION, Run, refuses

from transmla.cli.options import command_line
from transmla.convert import memory, prepare
from transmla.convert.memory import check_memory
from transmla.errors import TransmlaError
from transmla.plan import estimate
from transmla.plan.estimate_time import Rates
from transmla.recipe import parse_recipe

PLAN = ["plan", "source", *CALIBRATION]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that are equal in all runs: a CPU's, and an H200's."""
    known = {"cpu": Rates("cpu", 1e11, 5e10, 1e10), "cuda": Rates("cuda", 450e12, 50e12, 4.2e12)}
    monkeypatch.setattr(prepare, "measure_rates", lambda device, _: known[device.type])


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of 141 GB, as far as a plan looks at them."""
    monkeypatch.setattr(prepare, "pick_device", lambda _: GPU)
    monkeypatch.setattr(prepare, "runs_in_bfloat16", lambda *_: True)
    monkeypatch.setattr(prepare, "why_unsampled", lambda *_: "")
    monkeypatch.setattr(estimate, "is_fast_in_bfloat16", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**11, 141 * 10**9))
    for module in ("transmla.convert.memory", "transmla.workflow"):
        monkeypatch.setattr(f"{module}.free_memory_of", lambda _: 10**11)


def found(run: Run, *argv: str) -> dict[str, Any]:
    code, out, err = run(*PLAN, *argv, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("more", [[], ["--json"], ["--heal", "3"]])
def test_one_process_is_the_default(place: Path, run: Run, more: list[str]) -> None:
    assert run(*PLAN, *more) == run(*PLAN, *more, "--processes", "1")


@pytest.mark.usefixtures("two_gpus")
def test_one_gpu_is_the_default(place: Path, run: Run) -> None:
    assert run(*PLAN) == run(*PLAN, "--processes", "1")


@pytest.mark.usefixtures("two_gpus")
def test_two_gpus(place: Path, run: Run) -> None:
    one, two = found(run), found(run, "--processes", "2")
    assert two["memory_bytes"] == 2 * one["memory_bytes"]
    assert two["seconds"] < one["seconds"]
    assert two["disk_bytes"] == one["disk_bytes"]
    assert two["healing_seconds"] <= one["healing_seconds"]
    assert (two["processes"], two["refused"]) == (2, [])
    ways = two["healing_by_way"]
    assert ways["fsdp2"]["memory_bytes"] < ways["ddp"]["memory_bytes"]
    assert ways["ddp"]["seconds"] == two["healing_seconds"]
    assert {"processes", "process_memory_bytes", "healing_by_way", "launch"} == set(two) - set(one)


@pytest.mark.usefixtures("two_gpus")
def test_what_two_gpus_need_is_said(place: Path, run: Run) -> None:
    argv = [*CALIBRATION, "--allow-pickle", "--cache-ratio", "0.4"]
    _, out, _ = run("plan", "source", *argv, "--processes", "2")
    text = " ".join(out.split())
    assert "RAM for 2 processes" in text
    assert "each of 2 GPUs" in text
    for part in ("conversion", "healing, whole student on each", "healing, student divided (fsdp2.yaml)"):
        assert f"│ {part} " in text
    (start,) = (line for line in out.splitlines() if line.startswith("start: "))
    words = shlex.split(start)[1:]
    launcher = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "-m", "transmla", "convert", "source"]
    assert words[: len(launcher)] == launcher
    assert set(words[len(launcher) :]) == set(argv)
    assert "refuses" not in text


def test_a_source_without_a_tokenizer_is_refused_as_by_convert(place: Path, run: Run) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "source" / name).unlink()
    assert found(run)["refused"] == [
        "no tokenizer in 'source'; calibration, evaluation and the export itself need one; "
        "add tokenizer.json and tokenizer_config.json to that folder"
    ]


@pytest.mark.usefixtures("two_gpus")
def test_minutes_are_not_estimated(place: Path, run: Run) -> None:
    plan = found(run, "--processes", "2", "--heal", "3")
    assert [way["seconds"] for way in plan["healing_by_way"].values()] == [None, None]
    assert "--heal 3" in plan["launch"]
    assert found(run, "--processes", "2", "--heal", "off")["healing_by_way"] == {}


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["4"], "4 processes were started for 2 GPUs; each process needs a GPU of its own; start 2 processes"),
        (["3"], "3 processes cannot share the batches of 16 sequences of the healing"),
        (["2", "--device", "cuda:1"], "--device cuda:1 was given to 2 processes"),
    ],
)
def test_what_a_launch_would_refuse_is_said(place: Path, run: Run, argv: list[str], says: str) -> None:
    plan = found(run, "--processes", *argv)
    assert any(line.startswith(says) for line in plan["refused"])
    assert f"convert refuses this here: {says}" in " ".join(run(*PLAN, "--processes", *argv)[1].split())


def test_a_text_beyond_the_context_is_refused_as_by_convert(place: Path, run: Run) -> None:
    says = "calibration sequences of 99999999 tokens are longer than the source's context; at most 256; lower"
    (refused,) = found(run, "--calibration-length", "99999999")["refused"]
    assert refused.startswith(says)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--calibration", "nowhere.txt"], "no file nowhere.txt"),
        (["--calibration-split", "train"], "has no split 'train'; leave the split out"),
        (["--calibration-column", "text"], "has no column 'text'; leave the column out"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_as_by_convert(place: Path, run: Run, more: list[str], says: str) -> None:
    assert any(says in line for line in found(run, *more)["refused"])
    code, _, err = run("convert", "source", "-o", "out", *CALIBRATION, *more)
    assert code == 2
    assert says in " ".join(err.split())


def test_a_refusal_and_the_plan_count_the_same_memory(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 10**8)
    plan = found(run, "--calibration-sequences", "10000000")
    refused = next(line for line in plan["refused"] if "of memory" in line)
    says = re.match(r"the conversion needs about (.*) GB of memory, and (.*) GB for hidden states, which can", refused)
    assert says is not None, refused
    assert float(says[1]) + float(says[2]) == pytest.approx(plan["memory_bytes"] / 1e9, abs=0.11)


def test_processes_on_a_cpu(place: Path, run: Run) -> None:
    one, two = found(run), found(run, "--processes", "2")
    assert two["seconds"] == one["seconds"]
    assert two["memory_bytes"] == 2 * two["process_memory_bytes"] == 2 * one["memory_bytes"]
    start = shlex.split(two["launch"])
    assert start[:7] == ["torchrun", "--nproc_per_node", "2", "-m", "transmla", "convert", "source"]
    assert sorted(start[7:]) == sorted(CALIBRATION)
    _, out, _ = run(*PLAN, "--processes", "2", "--heal", "3")
    assert "start: torchrun --nproc_per_node 2 -m transmla convert source" in " ".join(out.split())
    assert "each of 2 processes" in out
    assert "share its cores" in out
    assert "fsdp2" not in out


def test_flags_as_they_are_written() -> None:
    given = {"seed": 0, "allow_pickle": True, "compile": False, "layers": None, "calibration": ["a b", "self:2"]}
    assert command_line(given) == [
        *("--seed", "0", "--allow-pickle", "--no-compile"),
        *("--calibration", "a b", "--calibration", "self:2"),
    ]


@pytest.mark.parametrize("number", ["0", "-2"])
def test_fewer_than_one_process_is_refused(place: Path, run: Run, number: str) -> None:
    says = f"--processes {number} is no number of processes; at least 1; give the number of GPUs"
    refuses(run, *PLAN, "--processes", number, says=says)


def test_convert_counts_the_processes_of_its_launch(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`convert` asks the same function, about the processes that accelerate started."""
    monkeypatch.setattr(memory, "free_memory", lambda: 9 * 10**8)
    monkeypatch.setattr(memory, "resident_memory", lambda: 0)
    off = ["--reconstruct", "off", "--heal", "off", "--device", "cpu"]
    assert found(run, *off)["refused"] == []
    (refused,) = found(run, *off, "--processes", "2")["refused"]
    assert refused.endswith("of memory for 2 processes; 0.9 GB are free; start 1 process")
    for name, value in {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    calibration = {"source": "text.txt", "sequences": 4, "length": 32}
    recipe = parse_recipe({"source": "source", "output": "o", "reconstruct": "off", "calibration": calibration}, "test")
    with pytest.raises(TransmlaError) as error:
        check_memory(prepare.prepare(recipe), 4, 32)
    assert str(error.value) == refused
