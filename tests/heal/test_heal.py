"""Whole healings: the held-out KL falls, a killed run resumes with the same result, and the output verifies."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_sources import SMALL_HEALING
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from transmla.cli.app import build
from transmla.errors import TransmlaError
from transmla.evaluate.verify import verify
from transmla.heal import loop as loops
from transmla.heal import natural_coordinates as natural
from transmla.heal import run
from transmla.heal.run import heal
from transmla.heal.settings import Healing
from transmla.reporter import Silent


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def curve(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "transmla.json").read_text())["healing"][-1]["curve"]


def interrupt_before_export(settings: Healing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all training steps of a healing, and interrupt it before it writes its export."""
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            heal(settings)


@pytest.mark.parametrize("trainable", ["attention", "all", "lora"])
def test_healing_lowers_the_kl_and_writes_a_valid_export(
    trainable: str, make_healing: Callable[..., Healing], pair: tuple[Path, Path]
) -> None:
    if trainable == "lora":
        pytest.importorskip("peft")
    healed = heal(make_healing(trainable=trainable, max_tokens=32 * 8 * 40, warmup=0.1, learning_rate=3e-4))
    points = curve(healed)
    assert points[-1]["held_out_kl"] < 0.95 * points[0]["held_out_kl"]
    before, after = load(pair[1]).state_dict(), load(healed).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("kv_a_proj" in name for name in changed)
    assert any("mlp" in name for name in changed) == (trainable == "all")
    failed = [c for c in verify(healed, source=str(pair[0])) if not c.passed]
    assert not failed
    card = (healed / "README.md").read_text()
    assert "## Healing" in card
    assert str(healed.parent) not in card
    assert not healed.with_name("healed.partial").exists()


def test_a_healed_export_can_be_healed_again(make_healing: Callable[..., Healing], tmp_path: Path) -> None:
    first = heal(make_healing())
    second = heal(make_healing(student=str(first), output=str(tmp_path / "again")))
    records = json.loads((second / "transmla.json").read_text())["healing"]
    assert len(records) == 2
    assert records[1]["held_out_kl"]["before"] == pytest.approx(records[0]["held_out_kl"]["after"], rel=1e-2)


class Log(Silent):
    """A reporter that keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_a_resumed_run_equals_an_uninterrupted_one(
    make_healing: Callable[..., Healing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = heal(make_healing(output=str(tmp_path / "uninterrupted")))
    original_step, calls = loops.Loop._step, 0

    def interrupted_step(self: Any, rows: Tensor) -> float:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return original_step(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "_step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            heal(make_healing())
    with pytest.raises(TransmlaError, match="--resume"):
        heal(make_healing())
    with pytest.raises(TransmlaError, match=r"settings.*; --learning-rate was .* and is 0\.002; repeat"):
        heal(make_healing(learning_rate=2e-3), resume=True)
    log = Log()
    resumed = heal(make_healing(), resume=True, reporter=log)
    assert [message for message in log.messages if "resuming" in message] == ["resuming at step 5"]
    without_seconds = lambda points: [{k: v for k, v in p.items() if k != "seconds"} for p in points]  # noqa: E731
    assert without_seconds(curve(resumed)) == without_seconds(curve(uninterrupted))
    weights, expected = load(resumed).state_dict(), load(uninterrupted).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_resume_refuses_another_text(
    make_healing: Callable[..., Healing], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            heal(make_healing())
    text_file.write_text(" ".join(reversed(text_file.read_text().split(" "))))
    with pytest.raises(TransmlaError, match=r"another student, teacher, text, settings.*; the text changed; repeat"):
        heal(make_healing(), resume=True)


def test_resume_refuses_missing_best_weights(
    make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt_before_export(make_healing(), monkeypatch)
    for file in (tmp_path / "healed.partial").glob("best-*"):
        file.unlink()
    with pytest.raises(TransmlaError, match=r"best-.* is missing"):
        heal(make_healing(), resume=True)


def test_resume_refuses_a_folder_of_another_command(make_healing: Callable[..., Healing], tmp_path: Path) -> None:
    (tmp_path / "healed.partial").mkdir()
    (tmp_path / "healed.partial" / "progress.json").write_text("{}")
    with pytest.raises(TransmlaError, match="holds no healing to continue"):
        heal(make_healing(), resume=True)
    assert (tmp_path / "healed.partial" / "progress.json").is_file()


@pytest.mark.parametrize("change", [{"patience": 1, "learning_rate": 10.0}, {"eval_every": 5}], ids=str)
def test_a_run_killed_while_writing_resumes_with_the_same_curve(
    change: dict[str, Any], make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uninterrupted = curve(heal(make_healing(**change, output=str(tmp_path / "uninterrupted"))))
    interrupt_before_export(make_healing(**change), monkeypatch)
    resumed = curve(heal(make_healing(**change), resume=True))
    assert [p["held_out_kl"] for p in resumed] == [p["held_out_kl"] for p in uninterrupted]


def test_a_run_killed_during_its_first_save_starts_again(make_healing: Callable[..., Healing], tmp_path: Path) -> None:
    (tmp_path / "healed.partial" / "state-00000000").mkdir(parents=True)
    assert len(curve(heal(make_healing(), resume=True))) == 5


def test_resume_accepts_a_student_in_another_folder(
    make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt_before_export(make_healing(), monkeypatch)
    moved = shutil.copytree(make_healing().student, tmp_path / "moved")
    assert heal(make_healing(student=str(moved)), resume=True).is_dir()


@pytest.mark.filterwarnings("error:.*gradient_checkpointing_enable")
def test_accumulation_does_not_change_the_curve(make_healing: Callable[..., Healing], tmp_path: Path) -> None:
    whole = curve(heal(make_healing()))
    parts = curve(heal(make_healing(accumulate=4, checkpointing=True, output=str(tmp_path / "parts"))))
    for point, expected in zip(parts, whole, strict=True):
        assert point["held_out_kl"] == pytest.approx(expected["held_out_kl"], rel=1e-3)


def test_compilation_does_not_change_the_curve(
    make_healing: Callable[..., Healing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Capture and autograd are what healing could break. Inductor's code generation takes minutes on a CPU.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    three_steps = {"max_tokens": 32 * 8 * 3}
    eager = curve(heal(make_healing(**three_steps)))
    compiled = curve(heal(make_healing(**three_steps, compile=True, output=str(tmp_path / "compiled"))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    for point, expected in zip(compiled, eager, strict=True):
        assert point["held_out_kl"] == pytest.approx(expected["held_out_kl"], rel=1e-3)


def test_a_larger_teacher(make_healing: Callable[..., Healing], make_source: Callable[..., Path]) -> None:
    larger = str(make_source(name="larger", hidden_size=96, num_hidden_layers=3))
    points = curve(heal(make_healing(teacher=larger, max_tokens=32 * 8 * 40, learning_rate=2e-3)))
    assert points[-1]["held_out_kl"] < 0.95 * points[0]["held_out_kl"]


def test_trackers_log_the_held_out_curve(make_healing: Callable[..., Healing], tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    class MemoryTracker(GeneralTracker):
        name, requires_logging_directory, main_process_only = "memory", False, True

        def __init__(self) -> None:
            super().__init__()
            self.logged: dict[int, dict[str, float]] = {}

        @property
        def tracker(self) -> Any:
            return self.logged

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

        def log(self, values: dict[str, float], step: int | None, **_: Any) -> None:
            self.logged[step or 0] = values

    tracker = MemoryTracker()
    accelerator = Accelerator(cpu=True, mixed_precision="no", log_with=tracker)
    accelerator.init_trackers("healing")
    points = curve(heal(make_healing(), accelerator=accelerator))
    assert {step: values["held_out_kl"] for step, values in tracker.logged.items()} == {
        point["step"]: point["held_out_kl"] for point in points
    }


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nan_rolls_back_at_half_the_rate(
    what: str, make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch
) -> None:
    original_step, calls = loops.Loop._step, 0

    def step_with_nan(self: Any, rows: Tensor) -> float:
        nonlocal calls
        calls += 1
        weight = next(p for p in self.model.parameters() if p.requires_grad)
        if calls == 7 and what == "loss":
            with torch.no_grad():
                weight.fill_(math.nan)
        factor = math.nan if calls == 7 and what == "gradient" else 1.0
        hook = weight.register_hook(lambda gradient: gradient * factor)
        loss = original_step(self, rows)
        hook.remove()
        assert math.isnan(loss) == (calls == 7)
        return loss

    monkeypatch.setattr(loops.Loop, "_step", step_with_nan)
    healed = heal(make_healing())
    record = json.loads((healed / "transmla.json").read_text())["healing"][-1]
    assert record["rollbacks"] == 1
    assert [point["step"] for point in record["curve"]] == [0, 3, 6, 9, 12]
    assert record["held_out_kl"]["after"] < record["held_out_kl"]["before"]
    assert all(bool(t.isfinite().all()) for t in load(healed).state_dict().values())


def test_a_loss_that_stays_nan_is_an_error(
    make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops.Loop, "_step", lambda self, rows: math.nan)
    with pytest.raises(TransmlaError, match="NaN or infinite at step 0, although the rate was halved 5 times"):
        heal(make_healing())


def test_patience_ends_the_run_and_keeps_the_best_weights(
    make_healing: Callable[..., Healing], pair: tuple[Path, Path]
) -> None:
    """At an absurd learning rate, every evaluation is worse than the one before the first step."""
    healed = heal(make_healing(learning_rate=10.0, patience=2))
    record = json.loads((healed / "transmla.json").read_text())["healing"][-1]
    assert record["best_step"] == 0
    assert record["steps"] == 6
    tokens = torch.randint(0, 128, (1, 20))
    with torch.no_grad():
        assert torch.allclose(load(healed)(tokens).logits, load(pair[1])(tokens).logits, atol=0.05)


def test_max_minutes_ends_the_run(make_healing: Callable[..., Healing]) -> None:
    healed = heal(make_healing(max_minutes=1e-6))
    assert [point["step"] for point in curve(healed)] == [0, 1]


@pytest.mark.parametrize(("minutes", "total"), [(None, 12), (60.0, 3600), (1e-6, 1)])
def test_the_bar_ends_where_the_budget_does(
    minutes: float | None, total: int, make_healing: Callable[..., Healing]
) -> None:
    """The tokens end first after an hour's limit, and the minutes after a short one."""
    seen: list[int] = []

    class Bar(Silent):
        def stage(self, name: str, total: int) -> None:
            self.bar = total if name == "healing" else 0

        def advance(self, done: int, note: str = "") -> None:
            if self.bar:
                seen.append(done)
                assert self.bar == total

    heal(make_healing(max_minutes=minutes), reporter=Bar())
    assert seen == sorted(seen)
    assert seen[-1] == total


def test_self_text_is_sampled_once_and_cached(
    make_healing: Callable[..., Healing], tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    self_text = {"data": ("self",), "self_tokens": 32 * 40}
    heal(make_healing(**self_text))
    monkeypatch.setattr("transmla.source.samples.sample_self", None)
    heal(make_healing(**self_text, output=str(tmp_path / "second")))
    assert len(list(assets.rglob("*.safetensors"))) == 1


def test_an_export_that_fails_verification_is_not_published(
    make_healing: Callable[..., Healing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_export = natural.to_export

    def export_with_nan(*args: Any) -> dict[str, Tensor]:
        tensors = to_export(*args)
        name = next(name for name in tensors if "kv_a_layernorm" in name)
        return tensors | {name: tensors[name] * math.nan}

    monkeypatch.setattr(run.natural, "to_export", export_with_nan)
    with pytest.raises(TransmlaError, match="does not pass 'finite'"):
        heal(make_healing())
    assert not (tmp_path / "healed").exists()


def test_heal_command(pair: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    command = [
        "heal",
        str(pair[1]),
        "--teacher",
        str(pair[0]),
        "-o",
        str(tmp_path / "healed"),
        "--data",
        str(text_file),
    ]
    for name, value in SMALL_HEALING.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    shown = CliRunner().invoke(build(), [*command, "--no-compile"])
    assert shown.exit_code == 0, shown.output
    assert "KL to the teacher" in shown.stdout
    assert (tmp_path / "healed" / "healing.png").read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(build(), [*command, "--batch", "0"])
    assert isinstance(refused.exception, TransmlaError)
