"""What makes a healing impossible is said in one line, before anything is written."""

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


def test_too_little_text(make_healing: Callable[..., Healing]) -> None:
    with pytest.raises(TransmlaError, match="too few"):
        heal(make_healing(max_tokens=10**9))


def test_an_output_in_use(make_healing: Callable[..., Healing], tmp_path: Path) -> None:
    (tmp_path / "healed").mkdir()
    (tmp_path / "healed" / "file").touch()
    with pytest.raises(TransmlaError, match="is not empty"):
        heal(make_healing())


def test_another_tokenizer(make_healing: Callable[..., Healing], pair: tuple[Path, Path]) -> None:
    file = pair[1] / "tokenizer.json"
    other = json.loads(file.read_text())
    words = other["model"]["vocab"]
    a, b = list(words)[10:12]
    words[a], words[b] = words[b], words[a]
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
    with pytest.raises(TransmlaError, match="is not what was converted"):
        heal(make_healing())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 5, "accumulate": 2}, "--batch 6"),
        ({"kl": 0.0}, "nothing to learn"),
        ({"length": 100000}, "longer than the models' context"),
    ],
    ids=str,
)
def test_settings(change: dict[str, Any], said: str, make_healing: Callable[..., Healing]) -> None:
    with pytest.raises(TransmlaError, match=said):
        heal(make_healing(**change))


def test_a_source_is_no_student(make_healing: Callable[..., Healing], pair: tuple[Path, Path]) -> None:
    with pytest.raises(TransmlaError, match="holds no finished conversion"):
        heal(make_healing(student=str(pair[0])))


def test_states_of_a_wider_teacher(make_healing: Callable[..., Healing], make_source: Callable[..., Path]) -> None:
    larger = str(make_source(name="larger", hidden_size=96, num_hidden_layers=3))
    with pytest.raises(TransmlaError, match="the teacher has 3 layers of 96, the student 2 of"):
        heal(make_healing(teacher=larger, hidden=1.0))


def test_deepspeeds_third_stage(make_healing: Callable[..., Healing]) -> None:
    plugin = SimpleNamespace(zero_stage=3)
    accelerator = SimpleNamespace(num_processes=1, distributed_type="DEEPSPEED", deepspeed_plugin=plugin)
    with pytest.raises(TransmlaError, match="stage 3"):
        check_settings(make_healing(), accelerator)
    plugin.zero_stage = 2
    check_settings(make_healing(), accelerator)
