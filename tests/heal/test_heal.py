"""Healing: the same model in other coordinates, a loss that falls, a run that resumes where it was, an export again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
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


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def curve(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "transmla.json").read_text())["healing"][-1]["curve"]


def die_while_writing(settings: Healing, monkeypatch: pytest.MonkeyPatch) -> None:
    """A healing that has learned all, and is interrupted before its export."""
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            heal(settings)


@pytest.mark.parametrize("trainable", ["attention", "all", "lora"])
def test_it_heals_and_leaves_an_export(
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
    told = json.loads((second / "transmla.json").read_text())["healing"]
    assert len(told) == 2
    assert told[1]["held_out_kl"]["before"] == pytest.approx(told[0]["held_out_kl"]["after"], rel=1e-2)


def test_a_killed_run_goes_on_as_the_unbroken_one(
    make_healing: Callable[..., Healing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = heal(make_healing(output=str(tmp_path / "unbroken")))
    real, calls = loops.Loop._step, 0

    def dying(self: Any, rows: Tensor) -> float:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return real(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            heal(make_healing())
    with pytest.raises(TransmlaError, match="--resume"):
        heal(make_healing())
    with pytest.raises(TransmlaError, match="another student, teacher, text, settings"):
        heal(make_healing(learning_rate=2e-3), resume=True)
    resumed = heal(make_healing(), resume=True)
    strip = lambda points: [{k: v for k, v in p.items() if k != "seconds"} for p in points]  # noqa: E731
    found, wanted = strip(curve(resumed)), strip(curve(unbroken))
    assert found == wanted
    ours, theirs = load(resumed).state_dict(), load(unbroken).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_text_is_another_run(
    make_healing: Callable[..., Healing], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            heal(make_healing())
    text_file.write_text(" ".join(reversed(text_file.read_text().split(" "))))
    with pytest.raises(TransmlaError, match="another student, teacher, text, settings"):
        heal(make_healing(), resume=True)


def test_best_weights_that_are_gone_are_missed(
    make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    die_while_writing(make_healing(), monkeypatch)
    for file in (tmp_path / "healed.partial").glob("best-*"):
        file.unlink()
    with pytest.raises(TransmlaError, match="is gone"):
        heal(make_healing(), resume=True)


def test_what_else_was_begun_there_is_not_continued(make_healing: Callable[..., Healing], tmp_path: Path) -> None:
    (tmp_path / "healed.partial").mkdir()
    (tmp_path / "healed.partial" / "progress.json").write_text("{}")
    with pytest.raises(TransmlaError, match="holds no healing to continue"):
        heal(make_healing(), resume=True)
    assert (tmp_path / "healed.partial" / "progress.json").is_file()


@pytest.mark.parametrize("change", [{"patience": 1, "learning_rate": 10.0}, {"eval_every": 5}], ids=str)
def test_a_run_that_dies_while_it_writes_ends_where_it_ended(
    change: dict[str, Any], make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unbroken = curve(heal(make_healing(**change, output=str(tmp_path / "unbroken"))))
    die_while_writing(make_healing(**change), monkeypatch)
    found = curve(heal(make_healing(**change), resume=True))
    assert [p["held_out_kl"] for p in found] == [p["held_out_kl"] for p in unbroken]


def test_a_run_that_dies_in_its_first_save_begins_again(make_healing: Callable[..., Healing], tmp_path: Path) -> None:
    (tmp_path / "healed.partial" / "state-00000000").mkdir(parents=True)
    assert len(curve(heal(make_healing(), resume=True))) == 5


def test_a_model_that_moved_is_the_same_run(
    make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    die_while_writing(make_healing(), monkeypatch)
    moved = shutil.copytree(make_healing().student, tmp_path / "moved")
    assert heal(make_healing(student=str(moved)), resume=True).is_dir()


def test_parts_of_a_step_add_up(make_healing: Callable[..., Healing], tmp_path: Path) -> None:
    whole = curve(heal(make_healing()))
    parts = curve(heal(make_healing(accumulate=4, checkpointing=True, output=str(tmp_path / "parts"))))
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours["held_out_kl"] == pytest.approx(theirs["held_out_kl"], rel=1e-3)


def test_compiled_layers_learn_the_same(
    make_healing: Callable[..., Healing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"max_tokens": 32 * 8 * 3}
    cut_for_ddp = []
    run_loop = loops.Loop.run
    monkeypatch.setattr(
        loops.Loop, "run", lambda *given: (cut_for_ddp.append(torch._dynamo.config.optimize_ddp), run_loop(*given))
    )
    plain = curve(heal(make_healing(**few)))
    compiled = curve(heal(make_healing(**few, compile=True, output=str(tmp_path / "compiled"))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    assert cut_for_ddp == [True, False]
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours["held_out_kl"] == pytest.approx(theirs["held_out_kl"], rel=1e-3)


def test_a_larger_teacher(make_healing: Callable[..., Healing], make_source: Callable[..., Path]) -> None:
    larger = str(make_source(name="larger", hidden_size=96, num_hidden_layers=3))
    points = curve(heal(make_healing(teacher=larger, max_tokens=32 * 8 * 40, learning_rate=2e-3)))
    assert points[-1]["held_out_kl"] < 0.95 * points[0]["held_out_kl"]


def test_trackers_are_accelerates_own(make_healing: Callable[..., Healing], tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    class Notes(GeneralTracker):
        name, requires_logging_directory, main_process_only = "notes", False, True

        def __init__(self) -> None:
            super().__init__()
            self.told: dict[int, dict[str, float]] = {}

        @property
        def tracker(self) -> Any:
            return self.told

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

        def log(self, values: dict[str, float], step: int | None, **_: Any) -> None:
            self.told[step or 0] = values

    notes = Notes()
    accelerator = Accelerator(cpu=True, mixed_precision="no", log_with=notes)
    accelerator.init_trackers("healing")
    points = curve(heal(make_healing(), accelerator=accelerator))
    assert {step: told["held_out_kl"] for step, told in notes.told.items()} == {
        point["step"]: point["held_out_kl"] for point in points
    }


def test_a_loss_that_is_no_number_goes_back_at_half_the_rate(
    make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loops.Loop._step, 0

    def sick(self: Any, rows: Tensor) -> float:
        nonlocal calls
        calls += 1
        if calls == 7:
            with torch.no_grad():
                self.parameters[0].fill_(math.nan)
        return real(self, rows)

    monkeypatch.setattr(loops.Loop, "_step", sick)
    healed = heal(make_healing())
    told = json.loads((healed / "transmla.json").read_text())["healing"][-1]
    assert told["rollbacks"] == 1
    assert [point["step"] for point in told["curve"]] == [0, 3, 6, 9, 12]
    assert all(bool(t.isfinite().all()) for t in load(healed).state_dict().values())


def test_it_gives_up_where_no_rate_helps(make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops.Loop, "_step", lambda self, rows: math.nan)
    with pytest.raises(TransmlaError, match="no number at step 0, after 5 lowered rates"):
        heal(make_healing())


def test_it_stops_when_nothing_is_gained_and_keeps_the_best(
    make_healing: Callable[..., Healing], pair: tuple[Path, Path]
) -> None:
    """At an absurd rate every look is worse than the one before any step."""
    healed = heal(make_healing(learning_rate=10.0, patience=2))
    told = json.loads((healed / "transmla.json").read_text())["healing"][-1]
    assert told["best_step"] == 0
    assert told["steps"] == 6
    tokens = torch.randint(0, 128, (1, 20))
    with torch.no_grad():
        assert torch.allclose(load(healed)(tokens).logits, load(pair[1])(tokens).logits, atol=0.05)


def test_minutes_end_it_too(make_healing: Callable[..., Healing]) -> None:
    healed = heal(make_healing(max_minutes=1e-6))
    assert [point["step"] for point in curve(healed)] == [0, 1]


def test_text_of_the_teacher_is_sampled_once(
    make_healing: Callable[..., Healing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    wanted = {"data": ("self",), "self_tokens": 32 * 40}
    heal(make_healing(**wanted))
    monkeypatch.setattr("transmla.heal.batches.sample_self", None)
    heal(make_healing(**wanted, output=str(tmp_path / "second")))
    assert len(list((tmp_path / "assets").rglob("*.safetensors"))) == 1


def test_what_does_not_verify_is_not_published(
    make_healing: Callable[..., Healing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = natural.to_export

    def spoiled(*args: Any) -> dict[str, Tensor]:
        found = real(*args)
        name = next(name for name in found if "kv_a_layernorm" in name)
        return found | {name: found[name] * math.nan}

    monkeypatch.setattr(run.natural, "to_export", spoiled)
    with pytest.raises(TransmlaError, match="does not pass 'finite'"):
        heal(make_healing())
    assert not (tmp_path / "healed").exists()


def test_the_command(pair: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    wanted = ["heal", str(pair[1]), "--teacher", str(pair[0]), "-o", str(tmp_path / "healed"), "--data", str(text_file)]
    for name, value in SMALL_HEALING.items():
        wanted += ["--" + name.replace("_", "-"), str(value)]
    shown = CliRunner().invoke(build(), [*wanted, "--no-compile"])
    assert shown.exit_code == 0, shown.output
    assert "KL to the teacher" in shown.stdout
    assert (tmp_path / "healed" / "healing.png").read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(build(), [*wanted, "--batch", "0"])
    assert isinstance(refused.exception, TransmlaError)
