"""Conversion and healing as one run: what is chosen, what is written, and a run killed in either part."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interrupted import files
from helpers.tiny_sources import SMALL_HEALING

from transmla import workflow
from transmla.convert.prepare import prepare
from transmla.errors import TransmlaError
from transmla.evaluate.verify import verify
from transmla.export.manifest import Manifest
from transmla.heal import choose, memory
from transmla.heal import loop as loops
from transmla.heal.choose import Choice, choose_healing
from transmla.heal.memory import Load, memory_bytes
from transmla.plan.estimate import parameters
from transmla.plan.fit_settings import SMALL_CACHE
from transmla.recipe import Recipe, parse_recipe
from transmla.reporter import Silent
from transmla.workflow import convert_and_heal

MakeRecipe = Callable[..., Recipe]
GPU, CPU = torch.device("cuda"), torch.device("cpu")


class Log(Silent):
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.stages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def stage(self, name: str, total: int) -> None:
        self.stages.append(name)


@pytest.fixture
def recipe(make_source: Callable[..., Path], make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose conversion ends with a healing of some steps."""
    settings = {name: value for name, value in SMALL_HEALING.items() if name not in ("data", "split")}
    chosen = Choice(settings | {"self_tokens": 32 * 12}, "ends with a healing")
    monkeypatch.setattr(workflow, "choice_for", lambda *_: chosen)
    return make_recipe(make_source(num_hidden_layers=3), calibration={"source": ["pydoc", "self"]})


def without_times(folder: Path) -> dict[str, bytes]:
    """The files of an export that hold no times."""
    timed = ("transmla.json", "README.md", "healing.png", "verification.json")
    return {name: content for name, content in files(folder).items() if name not in timed}


def test_the_export_is_the_healed_one(recipe: Recipe) -> None:
    log = Log()
    folder = convert_and_heal(recipe, reporter=log)
    assert folder == Path(recipe.output)
    assert "ends with a healing" in log.messages
    assert log.stages.index("converting layers") < log.stages.index("healing")
    manifest = json.loads((folder / "transmla.json").read_text())
    record = manifest["healing"][-1]
    assert record["held_out_kl"]["after"] <= record["held_out_kl"]["before"]
    assert record["settings"]["data"] == ["pydoc", "self"]
    assert "After the conversion, the model was distilled" in (folder / "README.md").read_text()
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(folder.name)] == [folder.name]
    assert all(check.passed for check in verify(folder, source=recipe.source))


def test_a_healing_that_the_disk_has_no_room_for_is_refused_before_the_conversion(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "choice_for", lambda *_: Choice(dict(SMALL_HEALING), "", disk_bytes=10**18))
    with pytest.raises(TransmlaError, match=r"the healing needs about 1000000000\.0 GB of disk; .*\(--heal off\)"):
        convert_and_heal(recipe)
    assert not list(Path(recipe.output).parent.glob(f"{Path(recipe.output).name}*"))


@pytest.mark.parametrize("where", ["converting", "between", "healing"])
def test_a_killed_run_resumes_to_the_same_weights(
    where: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = convert_and_heal(recipe.model_copy(update={"output": str(tmp_path / "whole")}))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    target = {
        "converting": ("transmla.convert.layers.LayerConverter.convert", killed),
        "between": ("transmla.workflow.heal", killed),
        "healing": ("transmla.heal.loop.Loop._step", killed),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(*target)
        with pytest.raises(KeyboardInterrupt):
            convert_and_heal(recipe)
    with pytest.raises(TransmlaError, match="--resume"):
        convert_and_heal(recipe)
    with monkeypatch.context() as patch:
        if where == "healing":  # the conversion is not repeated
            patch.setattr("transmla.workflow.convert", killed)
        resumed = convert_and_heal(recipe, resume=True)
    weights = {name for name in files(expected) if name.endswith(".safetensors")}
    assert weights
    assert all(files(resumed)[name] == files(expected)[name] for name in weights)


def test_a_cache_that_a_loss_chose_survives_healing_and_a_kill(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe.model_copy(update={"cache_ratio": "auto", "max_kl": 2.5, "format": "transmla"})
    expected = Manifest.read(convert_and_heal(recipe.model_copy(update={"output": str(tmp_path / "whole")})))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transmla.heal.loop.Loop._step", killed)
        with pytest.raises(KeyboardInterrupt):
            convert_and_heal(recipe)
    with monkeypatch.context() as patch:  # neither chosen nor converted again
        patch.setattr("transmla.workflow.convert", killed)
        manifest = Manifest.read(convert_and_heal(recipe, resume=True))
    assert manifest.healing
    assert manifest.promise == expected.promise is not None
    assert manifest.plan == expected.plan


def test_a_resumed_run_refuses_the_conversion_of_another_recipe(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert_and_heal(recipe)
    with pytest.raises(TransmlaError, match=r"unhealed' was converted with other settings"):
        convert_and_heal(recipe.model_copy(update={"seed": 1}), resume=True)
    with pytest.raises(TransmlaError, match=r"other settings.*; --kv-lora-rank was \d+ and is \d+, "):
        convert_and_heal(recipe.model_copy(update={"cache_ratio": 0.25}), resume=True)


def test_off_only_converts(make_source: Callable[..., Path], make_recipe: MakeRecipe) -> None:
    log = Log()
    folder = convert_and_heal(make_recipe(make_source(), heal="off"), reporter=log)
    assert json.loads((folder / "transmla.json").read_text())["healing"] == []
    assert not any("heal" in message for message in log.messages)


@pytest.mark.parametrize(("heal", "healed"), [("auto", False), (0.02, None)])
def test_texts_of_the_healing_are_checked_before_the_conversion(
    heal: Any,
    healed: bool | None,
    make_source: Callable[..., Path],
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A text too short for the default healing means no healing; for one that was asked for, a refusal."""
    chosen = Choice({"length": 32, "held_out": 4000, "self_tokens": 1000}, "ends with a healing")
    monkeypatch.setattr(workflow, "choice_for", lambda *_: chosen)
    recipe, log = make_recipe(make_source(), heal=heal), Log()
    if healed is None:
        monkeypatch.setattr(workflow, "convert", None)
        with pytest.raises(TransmlaError, match=r"too few; .* are held out; give a longer text, or pass --heal off$"):
            convert_and_heal(recipe, reporter=log)
        return
    folder = convert_and_heal(recipe, reporter=log)
    assert json.loads((folder / "transmla.json").read_text())["healing"] == []
    assert any(message.startswith("not healed: ") and "too few" in message for message in log.messages)


def test_a_healing_on_a_cpu_takes_small_steps(make_source: Callable[..., Path], make_recipe: MakeRecipe) -> None:
    """A step of the sizes for a GPU takes minutes on a CPU, and its samples hours."""
    prepared = prepare(make_recipe(make_source(max_position_embeddings=2048), heal=5.0))
    on_gpu, on_cpu = (choose_healing(prepared.recipe, prepared.plan, device, 10**12).settings for device in (GPU, CPU))
    assert on_gpu is not None
    assert on_cpu is not None
    assert on_gpu["batch"] * on_gpu["length"] >= 8 * on_cpu["batch"] * on_cpu["length"]
    assert on_gpu["self_tokens"] > 50 * on_cpu["self_tokens"]
    assert on_cpu["max_minutes"] == 5.0
    # The memory is that of these steps: what holds them whole on a CPU does not hold the steps of a GPU.
    load = Load("all", on_cpu["batch"] * on_cpu["length"], checkpointing=False, half=False)
    least = memory_bytes(prepared.plan, load)
    settings = choose_healing(prepared.recipe, prepared.plan, CPU, int(least / choose.USABLE) + 1).settings
    assert settings is not None
    assert (settings["trainable"], settings["accumulate"]) == ("all", 1)
    short = prepare(make_recipe(make_source(max_position_embeddings=128, name="short"), heal=5.0))
    settings = choose_healing(short.recipe, short.plan, CPU, 10**12).settings
    assert settings is not None
    assert settings["length"] == 128


def test_low_rank_updates_need_peft(
    make_source: Callable[..., Path], make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(make_recipe(make_source()))
    tokens = choose.ON_GPU["batch"] * choose.ON_GPU["length"] // choose.MOST_PARTS
    smallest = Load("lora", tokens, checkpointing=True, half=True)
    needed = memory_bytes(prepared.plan, smallest) / choose.USABLE + 1
    chosen = choose_healing(prepared.recipe, prepared.plan, GPU, int(needed)).settings
    assert chosen is not None
    assert chosen["trainable"] == "lora"
    monkeypatch.setattr(choose, "find_spec", lambda _: None)
    assert choose_healing(prepared.recipe, prepared.plan, GPU, int(needed)).settings is None


def test_an_output_in_the_way_is_refused_before_anything_is_opened(
    make_source: Callable[..., Path], make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(make_source())
    Path(recipe.output).mkdir()
    (Path(recipe.output) / "file").touch()
    monkeypatch.setattr(workflow, "prepare", None)
    with pytest.raises(TransmlaError, match="is not empty"):
        convert_and_heal(recipe)


@pytest.mark.parametrize(
    ("heal", "device", "gigabytes", "says"),
    [
        ("off", GPU, 80, ""),
        ("auto", CPU, 80, "not healed, for want of a GPU"),
        ("auto", GPU, 80, "ends with a healing of 10 million tokens, all weights"),
        (2.5, CPU, 80, "ends with a healing of 2.5 minutes, all weights"),
        ("auto", GPU, 0, "not healed: that needs"),
    ],
)
def test_the_choice_by_request_device_and_memory(
    heal: Any,
    device: torch.device,
    gigabytes: int,
    says: str,
    make_source: Callable[..., Path],
    make_recipe: MakeRecipe,
) -> None:
    prepared = prepare(make_recipe(make_source(), heal=heal))
    choice = choose_healing(prepared.recipe, prepared.plan, device, gigabytes * 10**9)
    assert choice.reason.startswith(says) if says else choice.reason == ""
    assert (choice.settings is None) == (not says.startswith("ends"))


def test_less_memory_means_more_parts_then_fewer_weights_then_none(
    make_source: Callable[..., Path], make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(make_recipe(make_source()))
    # The shape of Llama-3.1-8B at 512 + 64.
    for module in (choose, memory):
        monkeypatch.setattr(module, "parameters", lambda _: 8_000_000_000)
    spec = replace(
        prepared.plan.spec, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256
    )
    plan = replace(prepared.plan, spec=spec)
    monkeypatch.setattr("transmla.formats.native.FORMAT.__class__.attention_parameters", lambda *_: 40_000_000)
    found = {}
    for gigabytes in (400, 200, 80, 50, 30):
        settings = choose_healing(prepared.recipe, plan, GPU, gigabytes * 10**9).settings
        found[gigabytes] = settings and (settings["trainable"], settings["accumulate"], settings["max_tokens"])
    assert [found[g] and found[g][0] for g in found] == ["all", "all", "attention", "lora", None]
    assert found[400][1] <= found[200][1]
    assert found[400][2] == 2_500_000


@pytest.mark.parametrize("trainable", ["all", "attention", "lora"])
def test_a_healing_in_float32_needs_more_memory(
    trainable: str, make_source: Callable[..., Path], make_recipe: MakeRecipe
) -> None:
    """On a CPU, teacher, frozen weights and activations are float32."""
    plan = prepare(make_recipe(make_source())).plan
    half, full = (memory_bytes(plan, Load(trainable, 2048, checkpointing=True, half=half)) for half in (True, False))
    assert full - half > (2 if trainable == "all" else 3) * parameters(plan)


@pytest.mark.parametrize(("rank", "tokens"), [(40, 10_000_000), (4, 14_000_000)])
def test_a_small_cache_gets_more_tokens(
    rank: int, tokens: int, make_source: Callable[..., Path], make_recipe: MakeRecipe
) -> None:
    prepared = prepare(make_recipe(make_source(), kv_lora_rank=rank, qk_rope_head_dim=8))
    assert (prepared.plan.cache_ratio < SMALL_CACHE) == (tokens > 10_000_000)
    settings = choose_healing(prepared.recipe, prepared.plan, GPU, 80 * 10**9).settings
    assert settings is not None
    assert settings["max_tokens"] == tokens


@pytest.mark.parametrize(
    ("heal", "says"),
    [("maybe", "heal"), (0, "minutes above 0"), (-1, "minutes above 0"), ("nan", "heal"), ("inf", "minutes above 0")],
)
def test_bad_requests_are_one_line(heal: Any, says: str) -> None:
    with pytest.raises(TransmlaError, match=says):
        parse_recipe({"source": "a", "output": "b", "heal": heal}, "test")


def test_yaml_reads_off_as_false() -> None:
    assert parse_recipe({"source": "a", "output": "b", "heal": False}, "test").heal == "off"


def test_several_processes_share_the_batches_of_the_healing() -> None:
    """Each process computes as many sequences at once as one process would: its memory is the same."""
    choice = Choice({"batch": 16, "accumulate": 4}, "")
    for processes, parts in ((1, 4), (2, 2), (4, 1), (8, 1)):
        divided = workflow._divided(choice, processes).settings
        assert divided == {"batch": 16, "accumulate": parts}
    with pytest.raises(TransmlaError, match=r"3 processes cannot share the batches of 16 sequences .*--heal off"):
        workflow._divided(choice, 3)
    with pytest.raises(TransmlaError, match=r"16 processes cannot share .* 8 sequences .*; launch 2, 4 or 8 processes"):
        workflow._divided(Choice({"batch": 8, "accumulate": 1}, ""), 16)
    assert workflow._divided(Choice(None, "none"), 3).reason == "none"
