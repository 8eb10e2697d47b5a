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
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from transmla.cli import build
from transmla.errors import TransmlaError
from transmla.heal import loop as loops
from transmla.heal import natural, run
from transmla.heal.run import heal
from transmla.heal.settings import Healing
from transmla.verify import verify

SMALL = {"length": 32, "batch": 8, "held_out": 4, "max_tokens": 32 * 8 * 12, "eval_every": 3, "save_every": 5}


@pytest.fixture
def settings(pair: tuple[Path, Path], text_file: Path, tmp_path: Path) -> Callable[..., Healing]:
    def make(**changes: Any) -> Healing:
        named = {"student": str(pair[1]), "teacher": str(pair[0]), "output": str(tmp_path / "healed")}
        return Healing(**{**named, "data": (str(text_file),), **SMALL, **changes})

    return make


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def curve(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "transmla.json").read_text())["healing"][-1]["curve"]


@pytest.mark.parametrize("trainable", ["attention", "all", "lora"])
def test_it_heals_and_leaves_an_export(
    trainable: str, settings: Callable[..., Healing], pair: tuple[Path, Path]
) -> None:
    if trainable == "lora":
        pytest.importorskip("peft")
    healed = heal(settings(trainable=trainable, max_tokens=32 * 8 * 40, warmup=0.1, learning_rate=3e-4))
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


def test_a_healed_export_can_be_healed_again(settings: Callable[..., Healing], tmp_path: Path) -> None:
    first = heal(settings())
    second = heal(settings(student=str(first), output=str(tmp_path / "again")))
    told = json.loads((second / "transmla.json").read_text())["healing"]
    assert len(told) == 2
    assert told[1]["held_out_kl"]["before"] == pytest.approx(told[0]["held_out_kl"]["after"], rel=1e-2)


def test_a_killed_run_goes_on_as_the_unbroken_one(
    settings: Callable[..., Healing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = heal(settings(output=str(tmp_path / "unbroken")))
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
            heal(settings())
    with pytest.raises(TransmlaError, match="--resume"):
        heal(settings())
    with pytest.raises(TransmlaError, match="another student, teacher, text or settings"):
        heal(settings(learning_rate=2e-3), resume=True)
    resumed = heal(settings(), resume=True)
    strip = lambda points: [{k: v for k, v in p.items() if k != "seconds"} for p in points]  # noqa: E731
    found, wanted = strip(curve(resumed)), strip(curve(unbroken))
    # The loss is a mean since the last look or the last state, whichever is nearer.
    assert [p["held_out_kl"] for p in found] == [p["held_out_kl"] for p in wanted]
    ours, theirs = load(resumed).state_dict(), load(unbroken).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_text_is_another_run(
    settings: Callable[..., Healing], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            heal(settings())
    text_file.write_text(" ".join(reversed(text_file.read_text().split(" "))))
    with pytest.raises(TransmlaError, match="another student, teacher, text or settings"):
        heal(settings(), resume=True)


def test_best_weights_that_are_gone_are_missed(
    settings: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            heal(settings())
    for file in (tmp_path / "healed.partial").glob("best-*"):
        file.unlink()
    with pytest.raises(TransmlaError, match="is gone"):
        heal(settings(), resume=True)


def test_what_else_was_begun_there_is_not_continued(settings: Callable[..., Healing], tmp_path: Path) -> None:
    (tmp_path / "healed.partial").mkdir()
    (tmp_path / "healed.partial" / "progress.json").write_text("{}")
    with pytest.raises(TransmlaError, match="holds no healing to continue"):
        heal(settings(), resume=True)
    assert (tmp_path / "healed.partial" / "progress.json").is_file()


@pytest.mark.parametrize("change", [{"patience": 1, "learning_rate": 10.0}, {"eval_every": 5}], ids=str)
def test_a_run_that_dies_while_it_writes_ends_where_it_ended(
    change: dict[str, Any], settings: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unbroken = curve(heal(settings(**change, output=str(tmp_path / "unbroken"))))
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            heal(settings(**change))
    found = curve(heal(settings(**change), resume=True))
    assert [p["held_out_kl"] for p in found] == [p["held_out_kl"] for p in unbroken]


def test_parts_of_a_step_add_up(settings: Callable[..., Healing], tmp_path: Path) -> None:
    whole = curve(heal(settings()))
    parts = curve(heal(settings(accumulate=4, checkpointing=True, output=str(tmp_path / "parts"))))
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours["held_out_kl"] == pytest.approx(theirs["held_out_kl"], rel=1e-3)


def test_compiled_layers_learn_the_same(settings: Callable[..., Healing], tmp_path: Path) -> None:
    few = {"max_tokens": 32 * 8 * 3}
    plain = curve(heal(settings(**few)))
    compiled = curve(heal(settings(**few, compile=True, output=str(tmp_path / "compiled"))))
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours["held_out_kl"] == pytest.approx(theirs["held_out_kl"], rel=1e-3)


def test_trackers_are_accelerates_own(settings: Callable[..., Healing], tmp_path: Path) -> None:
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
    points = curve(heal(settings(), accelerator=accelerator))
    assert {step: told["held_out_kl"] for step, told in notes.told.items()} == {
        point["step"]: point["held_out_kl"] for point in points
    }


def test_a_loss_that_is_no_number_goes_back_at_half_the_rate(
    settings: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch
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
    healed = heal(settings())
    told = json.loads((healed / "transmla.json").read_text())["healing"][-1]
    assert told["rollbacks"] == 1
    assert [point["step"] for point in told["curve"]] == [0, 3, 6, 9, 12]
    assert all(bool(t.isfinite().all()) for t in load(healed).state_dict().values())


def test_it_gives_up_where_no_rate_helps(settings: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops.Loop, "_step", lambda self, rows: math.nan)
    with pytest.raises(TransmlaError, match="no number at step 0, after 5 lowered rates"):
        heal(settings())


def test_it_stops_when_nothing_is_gained_and_keeps_the_best(
    settings: Callable[..., Healing], pair: tuple[Path, Path]
) -> None:
    """At an absurd rate every look is worse than the one before any step."""
    healed = heal(settings(learning_rate=10.0, patience=2))
    told = json.loads((healed / "transmla.json").read_text())["healing"][-1]
    assert told["best_step"] == 0
    assert told["steps"] == 6
    tokens = torch.randint(0, 128, (1, 20))
    with torch.no_grad():
        assert torch.allclose(load(healed)(tokens).logits, load(pair[1])(tokens).logits, atol=0.05)


def test_minutes_end_it_too(settings: Callable[..., Healing]) -> None:
    healed = heal(settings(max_minutes=1e-6))
    assert [point["step"] for point in curve(healed)] == [0, 1]


def test_text_of_the_teacher_is_sampled_once(
    settings: Callable[..., Healing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    wanted = {"data": ("self",), "self_tokens": 32 * 40}
    heal(settings(**wanted))
    monkeypatch.setattr("transmla.heal.text.sample_self", None)
    heal(settings(**wanted, output=str(tmp_path / "second")))
    assert len(list((tmp_path / "assets").rglob("*.safetensors"))) == 1


class TestRefusals:
    def test_too_little_text(self, settings: Callable[..., Healing]) -> None:
        with pytest.raises(TransmlaError, match="too few"):
            heal(settings(max_tokens=10**9))

    def test_an_output_in_use(self, settings: Callable[..., Healing], tmp_path: Path) -> None:
        (tmp_path / "healed").mkdir()
        (tmp_path / "healed" / "file").touch()
        with pytest.raises(TransmlaError, match="is not empty"):
            heal(settings())

    def test_another_tokenizer(self, settings: Callable[..., Healing], pair: tuple[Path, Path]) -> None:
        file = pair[1] / "tokenizer.json"
        other = json.loads(file.read_text())
        words = other["model"]["vocab"]
        a, b = list(words)[10:12]
        words[a], words[b] = words[b], words[a]
        changed = pair[0] / "tokenizer.json"
        changed.write_text(json.dumps(other))
        with pytest.raises(TransmlaError, match="different tokenizers"):
            heal(settings())

    def test_another_vocabulary(
        self, settings: Callable[..., Healing], make_source: Callable[..., Path], pair: tuple[Path, Path]
    ) -> None:
        teacher = make_source(name="large", vocab_size=160)
        for file in pair[0].glob("tokenizer*"):
            shutil.copyfile(file, teacher / file.name)
        with pytest.raises(TransmlaError, match="vocabulary has 160 entries"):
            heal(settings(teacher=str(teacher)))

    def test_a_changed_student(self, settings: Callable[..., Healing], pair: tuple[Path, Path]) -> None:
        (pair[1] / "config.json").write_text((pair[1] / "config.json").read_text() + " ")
        with pytest.raises(TransmlaError, match="is not what was converted"):
            heal(settings())

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"batch": 5, "accumulate": 2}, "--batch 6"),
            ({"kl": 0.0}, "nothing to learn"),
            ({"length": 100000}, "longer than the models' context"),
        ],
        ids=str,
    )
    def test_settings(self, change: dict[str, Any], said: str, settings: Callable[..., Healing]) -> None:
        with pytest.raises(TransmlaError, match=said):
            heal(settings(**change))

    def test_a_source_is_no_student(self, settings: Callable[..., Healing], pair: tuple[Path, Path]) -> None:
        with pytest.raises(TransmlaError, match="holds no finished conversion"):
            heal(settings(student=str(pair[0])))


def test_what_does_not_verify_is_not_published(
    settings: Callable[..., Healing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = natural.leave

    def spoiled(*args: Any) -> dict[str, Tensor]:
        found = real(*args)
        name = next(name for name in found if "kv_a_layernorm" in name)
        return found | {name: found[name] * math.nan}

    monkeypatch.setattr(run.natural, "leave", spoiled)
    with pytest.raises(TransmlaError, match="does not pass 'finite'"):
        heal(settings())
    assert not (tmp_path / "healed").exists()


def test_the_command(pair: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    wanted = ["heal", str(pair[1]), "--teacher", str(pair[0]), "-o", str(tmp_path / "healed"), "--data", str(text_file)]
    for name, value in SMALL.items():
        wanted += ["--" + name.replace("_", "-"), str(value)]
    shown = CliRunner().invoke(build(), wanted)
    assert shown.exit_code == 0, shown.output
    assert "KL to the teacher" in shown.stdout
    assert (tmp_path / "healed" / "healing.png").read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(build(), [*wanted, "--batch", "0"])
    assert isinstance(refused.exception, TransmlaError)
