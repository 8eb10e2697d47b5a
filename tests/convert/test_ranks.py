"""A conversion on several processes gives one process's result, and is interrupted and refused like one process's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.conversions import write_source
from helpers.convert_on_processes import convert, run
from helpers.heal_on_two_processes import start_server
from helpers.interrupted import files
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from transmla.errors import TransmlaError
from transmla.evaluate.verify import verify
from transmla.modeling.registration import register
from transmla.ranks import SIZES, Ranks, describe_launch, launched
from transmla.source.load import load_tokenizer

LAYERS = 3
# Largest relative difference of tensors, and of logits, from one process's. Layers are computed in float32.
TENSORS, LOGITS = 5e-5, 5e-5
FITS: dict[str, dict[str, Any]] = {"fast": {"steps": 12}, "full": {"steps": 12, "tokens": 96}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sources and a text of random characters, whose hidden states have full rank."""
    start_server()
    register()
    folder = tmp_path_factory.mktemp("ranks")
    sizes = {"num_hidden_layers": LAYERS, "max_position_embeddings": 64}
    write_source(folder / "llama", **sizes)
    # Narrow heads: the text's 90 different tokens must not leave directions of the first layer's features open.
    write_source(folder / "qwen3", family="qwen3", head_dim=8, **sizes)
    picks = torch.randint(33, 123, (40_000,), generator=torch.Generator().manual_seed(1))
    (folder / "text.txt").write_text("".join(map(chr, picks.tolist())))
    return folder


def command(folder: Path, family: str, output: str, *more: str, sequences: int = 9) -> list[str]:
    amounts = ["--calibration-sequences", str(sequences), "--calibration-length", "48", "--cache-ratio", "0.5"]
    places = [str(folder / family), "--output", str(folder / output), "--device", "cpu", "--heal", "off"]
    return [*places, "--calibration", str(folder / "text.txt"), *amounts, *more]


def converted(size: int, folder: Path, output: str, argv: list[str]) -> Path:
    """Convert on ``size`` processes; fail if one fails."""
    logs, cache = folder / f"{output}-logs", folder / f"{output}-cache"
    cache.mkdir()
    codes = run(size, convert, (argv, {"fits": FITS, "cache": str(cache)}), logs)
    assert codes == [0] * size, log(logs)
    return folder / output


def log(logs: Path) -> str:
    return "\n".join(file.read_text()[-3000:] for file in sorted(logs.iterdir()))


def tensors(export: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(export.glob("model-*")) for name, t in load_file(file).items()}


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def logits(export: Path) -> torch.Tensor:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32), load_tokenizer(export)
    return model(torch.tensor([tokenizer((export.parent / "text.txt").read_text()[:500]).input_ids[:60]])).logits


@pytest.mark.parametrize(
    ("family", "size", "sequences", "more"),
    [
        ("llama", 3, 7, ["--reconstruct", "off"]),
        ("llama", 2, 9, ["--reconstruct", "fast"]),  # the rows of a step are divided
        ("llama", 3, 9, ["--reconstruct", "full"]),  # and its tokens
        ("qwen3", 2, 7, ["--reconstruct", "full"]),
        ("llama", 3, 2, ["--reconstruct", "fast", "--layers", "0,2"]),  # fewer sequences than processes
    ],
    ids=["closed form", "fast", "full", "normed queries", "kept layer"],
)
def test_several_processes_give_the_result_of_one(
    family: str, size: int, sequences: int, more: list[str], folder: Path, request: pytest.FixtureRequest
) -> None:
    exports = []
    for processes in (1, size):
        output = f"{request.node.callspec.id.replace(' ', '-')}-{processes}"
        argv = command(folder, family, output, *more, sequences=sequences)
        exports.append(converted(processes, folder, output, argv))
    one, several = map(tensors, exports)
    assert one.keys() == several.keys()
    # With normed queries, singular values are close, and the basis of a latent is open. The logits do not depend on it.
    for name in one if family == "llama" else ():
        assert difference(several[name], one[name]) <= TENSORS, name
    assert difference(*map(logits, reversed(exports))) <= LOGITS
    assert files(exports[0]).keys() == files(exports[1]).keys()
    assert not list(folder.glob(f"{exports[1].name}.partial"))
    assert all(check.passed for check in verify(exports[1], source=str(folder / family)))


def test_all_processes_calibrate_on_the_samples_of_the_first(folder: Path) -> None:
    errors = []
    for size in (1, 2):
        argv = command(folder, "llama", f"self-{size}", "--calibration", "self", sequences=8)
        record = json.loads((converted(size, folder, f"self-{size}", argv) / "transmla.json").read_text())
        errors.append([layer["relative_error"] for layer in record["layers"]])
        assert record["texts"] == {"text.txt": 0.5, "self": 0.5}
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_a_killed_run_resumes_to_the_same_bytes(folder: Path) -> None:
    """Only on as many processes: others would add up numbers in another order."""
    argv = command(folder, "llama", "killed", "--reconstruct", "full")
    whole = converted(2, folder, "whole", command(folder, "llama", "whole", "--reconstruct", "full"))
    codes = run(2, convert, (argv, {"fits": FITS, "kill": 1}), folder / "first-logs")
    assert 0 not in codes
    assert not (folder / "killed").exists()
    logs = folder / "other-logs"
    assert run(1, convert, ([*argv, "--resume"], {"fits": FITS}), logs) == [2]
    assert "another number of processes" in log(logs)
    resumed = converted(2, folder, "killed", [*argv, "--resume"])
    assert tensors(whole).keys() == tensors(resumed).keys()
    assert all(torch.equal(tensor, tensors(whole)[name]) for name, tensor in tensors(resumed).items())


def test_an_error_of_the_first_process_ends_all(folder: Path) -> None:
    """The first process alone reads the texts; the others do not wait for it for hours."""
    logs = folder / "short-logs"
    argv = command(folder, "llama", "short", sequences=100_000)
    assert run(2, convert, (argv, {}), logs) == [2, 2]
    assert log(logs).count("error: ") == 1
    assert not list(folder.glob("short*/"))[1:]  # the logs alone


def test_a_decomposition_that_fails_in_one_process_is_an_error_of_all(folder: Path) -> None:
    """The other process waits for the matrices, and must not report a bug when the connection ends."""
    logs = folder / "undecomposed-logs"
    argv = command(folder, "llama", "undecomposed", "--reconstruct", "full")
    assert run(2, convert, (argv, {"fits": FITS, "undecomposed": 1}), logs) == [2, 2]
    assert "Traceback" not in log(logs)
    assert log(logs).count("error: layer 0: its statistics cannot be decomposed") == 2


def test_the_memory_of_all_processes_is_counted(folder: Path) -> None:
    """Where one process has room, two are refused as `plan --processes 2` says (tests/cli/test_plan_processes.py)."""
    for size, codes in ((1, [0]), (2, [2, 2])):
        logs = folder / f"free-{size}-logs"
        argv = command(folder, "llama", f"free-{size}", "--reconstruct", "off")
        assert run(size, convert, (argv, {"free": 9 * 10**8}), logs) == codes
    assert "of memory for 2 processes; 0.9 GB are free; start 1 process" in " ".join(log(logs).split())


def test_a_healing_follows(folder: Path) -> None:
    argv = command(folder, "llama", "healed", "--reconstruct", "fast", "--heal", "0.02")
    export = converted(2, folder, "healed", argv)
    (record,) = json.loads((export / "transmla.json").read_text())["healing"]
    assert record["held_out_kl"]["after"] <= record["held_out_kl"]["before"]
    assert all(check.passed for check in verify(export, source=str(folder / "llama")))
    assert not (folder / "healed.unhealed").exists()


def test_one_process_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launched("cuda:1") == Ranks()
    assert not torch.distributed.is_initialized()


def test_a_certain_gpu_is_refused_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(TransmlaError, match=r"--device cuda:1 was given to 2 processes; .*CUDA_VISIBLE_DEVICES"):
        launched("cuda:1")


def test_the_processes_of_a_launch_are_said_once(folder: Path) -> None:
    argv = command(folder, "llama", "counted", "--reconstruct", "off", "--heal", "off")
    converted(2, folder, "counted", argv)
    assert "2 processes share the work" in log(folder / "counted-logs")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, ""),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "2 processes share the work"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, ""),
        ({"MASTER_ADDR": "127.0.0.1"}, ""),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, ""),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "accelerate has started one process alone"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "h", "OMPI_COMM_WORLD_SIZE": "2"}, ""),
    ],
)
def test_a_launch_is_described(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], says: str) -> None:
    for name in (*SIZES, "RANK", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = describe_launch()
    assert said.startswith(says)
    assert bool(said) == bool(says)


def test_accelerate_says_no_number_where_it_starts_one_process_of_several() -> None:
    """The variables that `describe_launch` reads are those of accelerate's own launcher."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    for number, several in (("1", False), ("2", True)):
        argv = ["--cpu", "--num_processes", number, "--mixed_precision", "no", "--dynamo_backend", "no", "x.py"]
        parsed = launch_command_parser().parse_args([*argv[:-1], "--num_machines", "1", argv[-1]])
        parsed.use_cpu = True
        parsed.num_cpu_threads_per_process = 1
        _, environment = prepare_simple_launcher_cmd_env(parsed)
        assert ("MASTER_ADDR" in environment) == several
        assert "ACCELERATE_MIXED_PRECISION" in environment
