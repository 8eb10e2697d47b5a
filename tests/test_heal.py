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
from transmla.heal.losses import Distiller
from transmla.heal.optimiser import choose_trainable, make_optimiser, set_rates
from transmla.heal.run import heal
from transmla.heal.settings import Healing
from transmla.heal.text import Text
from transmla.pipeline import convert
from transmla.recipe import Recipe
from transmla.verify import verify

SMALL = {"length": 32, "batch": 8, "held_out": 4, "max_tokens": 32 * 8 * 12, "eval_every": 3, "save_every": 5}


@pytest.fixture
def pair(make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]) -> tuple[Path, Path]:
    """A source and its export."""
    source = make_source()
    return source, convert(make_recipe(source, cache_ratio=0.5))


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


@pytest.mark.parametrize("rank", [None, 24])
def test_natural_coordinates_are_the_same_model(
    rank: int | None, make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    folder = convert(make_recipe(make_source(), cache_ratio=0.5, q_lora_rank=rank, dtype="float32"))
    model, tokens = load(folder), torch.randint(0, 128, (2, 20))
    with torch.no_grad():
        wanted = model(tokens).logits
        natural.enter(model)
        natural.watch(model, watching=True)
        found = model(tokens).logits
        natural.watch(model, watching=False)
    assert torch.allclose(found, wanted, atol=1e-3)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    back = load(folder)
    unknown = back.load_state_dict(natural.leave(model, weights, torch.float32), strict=True)
    assert not unknown.unexpected_keys
    with torch.no_grad():
        assert torch.allclose(back(tokens).logits, wanted, atol=1e-3)


def test_rows_of_one_tensor_are_of_one_size_in_natural_coordinates(pair: tuple[Path, Path]) -> None:
    model = load(pair[1])

    def spread(model: Any) -> float:
        rows = [(a.kv_a_proj_with_mqa.weight.detach(), a.kv_lora_rank) for _, a in natural.attentions(model)]
        return max(float(w[:rank].norm() / w[rank:].norm()) for w, rank in rows)

    assert spread(model) < 1e-3
    natural.enter(model)
    assert 1e-2 < spread(model) < 1e2


@pytest.mark.parametrize("trainable", ["attention", "all", "lora"])
def test_it_heals_and_leaves_an_export(
    trainable: str, settings: Callable[..., Healing], pair: tuple[Path, Path]
) -> None:
    if trainable == "lora":
        pytest.importorskip("peft")
    healed = heal(settings(trainable=trainable, max_tokens=32 * 8 * 40, warmup=0.1))
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


def test_names_survive_what_accelerate_puts_between() -> None:
    name = "module._orig_mod.student.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight"
    assert loops._unwrapped(name) == "student.model.layers.0.self_attn.q_proj.weight"


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


class TestLosses:
    """Against the formulas, written out."""

    def test_of_logits(self, pair: tuple[Path, Path]) -> None:
        student, teacher = load(pair[1]), load(pair[0])
        tokens = torch.randint(0, 128, (2, 9))
        with torch.no_grad():
            ours, theirs = (m(tokens).logits.double().flatten(0, 1) for m in (student, teacher))
            made = Distiller(student, teacher, kl=0.7, cross_entropy=0.2, hidden=0.0, temperature=2.0)
            total, kl = made(tokens)
            cool = made.eval()(tokens)[1]
        p, q = (ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1)
        wanted = (q.exp() * (q - p)).sum(-1).mean()
        words = ours.log_softmax(-1).view(2, 9, -1)[:, :-1].gather(-1, tokens[:, 1:, None])
        assert float(kl) == pytest.approx(float(wanted), rel=1e-4)
        assert float(total) == pytest.approx(0.7 * 4 * float(wanted) - 0.2 * float(words.mean()), rel=1e-4)
        p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
        assert float(cool) == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-4)

    def test_chunks_change_nothing(self, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        student, teacher = load(pair[1]), load(pair[0])
        made = Distiller(student, teacher, kl=1.0, cross_entropy=0.5, hidden=0.3, temperature=1.0)
        tokens, found = torch.randint(0, 128, (2, 9)), []
        for values in (2**28, 128 * 5):
            monkeypatch.setattr("transmla.heal.losses.CHUNK_VALUES", values)
            student.zero_grad()
            loss, _ = made(tokens)
            loss.backward()
            found.append((loss.detach(), student.model.layers[0].self_attn.o_proj.weight.grad.clone()))
        assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
        assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)

    def test_a_model_is_its_own_best_student(self, pair: tuple[Path, Path]) -> None:
        teacher = load(pair[0])
        loss, kl = Distiller(teacher, teacher, kl=1.0, cross_entropy=0.0, hidden=1.0, temperature=1.0)(
            torch.randint(0, 128, (2, 9))
        )
        assert abs(float(loss)) < 1e-6
        assert abs(float(kl)) < 1e-6


def test_rates_are_in_units_of_a_tensors_size(settings: Callable[..., Healing], pair: tuple[Path, Path]) -> None:
    model = choose_trainable(load(pair[1]), settings(trainable="all"))
    optimiser = make_optimiser(model, settings(trainable="all", other_rate=0.5, warmup=0.1))
    names = [name for name, _ in model.named_parameters()]
    for name, group in zip(names, optimiser.param_groups, strict=True):
        size = float(group["params"][0].detach().square().mean().sqrt())
        assert group["full"] == pytest.approx(3e-4 * size * (1.0 if "self_attn" in name else 0.5))
    shares = [set_rates(optimiser, p, settings(warmup=0.1), 1.0) for p in (0.0, 0.05, 0.1, 0.5, 0.99)]
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > shares[3] > shares[4]


def test_a_text_is_read_whole_before_it_is_read_again() -> None:
    stream = Text("stream", torch.arange(1000), length=10, held_out=5, seed=0)
    assert stream.sequences == 94
    seen = torch.cat([stream[i] for i in range(94)])
    assert len(seen.unique()) == 940
    assert int(seen.max()) < 950
    assert sorted(stream.held_out.flatten().tolist()) == list(range(950, 1000))
    assert not torch.equal(stream[0], stream[94])
    rows = Text("rows", torch.arange(80).view(8, 10), length=10, held_out=2, seed=0)
    assert sorted(int(rows[i][0]) for i in range(6)) == list(range(0, 60, 10))


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
