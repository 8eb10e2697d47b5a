"""An impossible healing is refused with a one-line error before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from transmla.errors import TransmlaError
from transmla.heal.checks import check_settings
from transmla.heal.run import heal
from transmla.heal.settings import Healing


def test_a_tracker_that_would_log_nothing(
    make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TransmlaError, match=r"unknown tracker 'nothing'; accelerate has .*wandb"):
        heal(make_healing(track=("nothing",)))
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(TransmlaError, match="--track wandb would log nothing; wandb is not installed; pip install"):
        heal(make_healing(track=("tensorboard", "wandb")))


def test_a_text_with_too_few_tokens(make_healing: Callable[..., Healing]) -> None:
    with pytest.raises(TransmlaError, match="too few"):
        heal(make_healing(max_tokens=10**9))


def test_an_output_folder_that_is_not_empty(make_healing: Callable[..., Healing], tmp_path: Path) -> None:
    (tmp_path / "healed").mkdir()
    (tmp_path / "healed" / "file").touch()
    with pytest.raises(TransmlaError, match="is not empty"):
        heal(make_healing())


def test_another_tokenizer(make_healing: Callable[..., Healing], pair: tuple[Path, Path]) -> None:
    file = pair[1] / "tokenizer.json"
    other = json.loads(file.read_text())
    vocabulary = other["model"]["vocab"]
    a, b = list(vocabulary)[10:12]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    changed = pair[0] / "tokenizer.json"
    changed.write_text(json.dumps(other))
    with pytest.raises(TransmlaError, match="different tokenizers"):
        heal(make_healing())


def test_another_vocabulary(
    make_healing: Callable[..., Healing], make_source: Callable[..., Path], pair: tuple[Path, Path]
) -> None:
    teacher = make_source(name="large", vocab_size=160)
    for file in pair[0].glob("tokenizer*"):
        shutil.copyfile(file, teacher / file.name)
    with pytest.raises(TransmlaError, match="vocabulary has 160 entries"):
        heal(make_healing(teacher=str(teacher)))


def test_a_changed_student(make_healing: Callable[..., Healing], pair: tuple[Path, Path]) -> None:
    (pair[1] / "config.json").write_text((pair[1] / "config.json").read_text() + " ")
    with pytest.raises(TransmlaError, match="has changed since it was written"):
        heal(make_healing())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 5, "accumulate": 2}, "; there is 1 process, and each computes 2 parts; --batch 6"),
        ({"kl": 0.0}, "nothing to learn"),
        ({"length": 512}, "longer than the models' context"),
    ],
    ids=str,
)
def test_invalid_settings(change: dict[str, Any], message: str, make_healing: Callable[..., Healing]) -> None:
    with pytest.raises(TransmlaError, match=message):
        heal(make_healing(**change))


def test_a_student_without_a_manifest(make_healing: Callable[..., Healing], pair: tuple[Path, Path]) -> None:
    with pytest.raises(TransmlaError, match="holds no finished conversion"):
        heal(make_healing(student=str(pair[0])))


def test_hidden_states_of_a_wider_teacher(
    make_healing: Callable[..., Healing], make_source: Callable[..., Path]
) -> None:
    larger = str(make_source(name="larger", hidden_size=96, num_hidden_layers=3))
    with pytest.raises(TransmlaError, match="the teacher has 3 layers of width 96, the student 2 of"):
        heal(make_healing(teacher=larger, hidden=1.0))


def fake_accelerator(kind: str, *, fsdp2: bool = False, stage: int = 0, efficient: bool = False) -> Any:
    return SimpleNamespace(
        num_processes=1,
        distributed_type=kind,
        is_fsdp2=fsdp2,
        deepspeed_plugin=SimpleNamespace(zero_stage=stage),
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=efficient)),
    )


def test_unsupported_sharding(make_healing: Callable[..., Healing]) -> None:
    for accelerator, message in (
        (fake_accelerator("DEEPSPEED", stage=0), "stage 0"),
        (fake_accelerator("DEEPSPEED", stage=3), "stage 3"),
        (fake_accelerator("FSDP"), "version 1"),
        (fake_accelerator("FSDP", fsdp2=True, efficient=True), "cpu_ram_efficient_loading"),
    ):
        with pytest.raises(TransmlaError, match=message):
            check_settings(make_healing(), accelerator)
    for accelerator in (
        fake_accelerator("DEEPSPEED", stage=2),
        fake_accelerator("FSDP", fsdp2=True),
        fake_accelerator("MULTI_GPU"),
    ):
        check_settings(make_healing(), accelerator)


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed", "DEEPSPEED")])
def test_recipes_accelerate_are_valid_configurations(name: str, kind: str) -> None:
    from accelerate.commands.config import load_config_from_file

    config = load_config_from_file(str(Path(__file__).parents[2] / "recipes" / "accelerate" / f"{name}.yaml"))
    assert kind in str(config.distributed_type)
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == 2
