"""The estimate of a healing's memory, and the refusal of healings that certainly do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from transmla.artifacts import Plan
from transmla.errors import TransmlaError
from transmla.export.manifest import Manifest
from transmla.heal import memory
from transmla.heal.memory import CERTAIN, Load, check_memory, memory_bytes
from transmla.heal.run import heal
from transmla.heal.settings import Healing

GB = 10**9


@pytest.fixture
def large(make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of an export with the sizes of Qwen3-8B at half the cache."""
    plan = Manifest.read(Path(make_healing().student)).plan
    sizes = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936}
    monkeypatch.setattr(memory, "parameters", lambda _: 8_200_000_000)
    monkeypatch.setattr("transmla.formats.native.FORMAT.__class__.attention_parameters", lambda *_: 56_000_000)
    return replace(plan, spec=replace(plan.spec, **sizes))


def launched(processes: int = 1, *, fsdp2: bool = False) -> Any:
    return SimpleNamespace(
        device=torch.device("cuda"),
        num_processes=processes,
        is_fsdp2=fsdp2,
        distributed_type="FSDP" if fsdp2 else "NO",
        mixed_precision="bf16",
    )


def refusal(plan: Plan, free: int, accelerator: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str | None:
    """Return the message with which a healing is refused; None if it is not."""
    monkeypatch.setattr(memory, "free_memory_of", lambda _: free)
    monkeypatch.setattr(memory, "from_main", lambda _, value: value)
    try:
        check_memory(Healing(student="s", teacher="t", output="o", **settings), plan, accelerator)
    except TransmlaError as error:
        return str(error)
    return None


def test_a_measured_healing(large: Plan) -> None:
    """An H200 held 75.2 GB at most, with the CUDA context, while it healed such an export (docs/healing.md)."""
    needed = memory_bytes(large, Load("attention", 2 * 1024, checkpointing=True, half=True))
    assert 65 * GB < needed < 76 * GB


def test_what_is_divided(large: Plan) -> None:
    whole, divided = (memory_bytes(large, Load("all", 1024, True, True, shards)) for shards in (1, 4))
    assert whole - divided == 3 * 16 * 8_200_000_000 // 4


@pytest.mark.parametrize(
    ("gigabytes", "settings", "remedy"),
    [
        (80, {"trainable": "attention", "length": 1024, "batch": 16, "accumulate": 8, "checkpointing": True}, None),
        (80, {"trainable": "attention"}, None),
        (100, {"trainable": "all"}, "use --trainable attention --accumulate 16"),
        (48, {"trainable": "attention"}, "use --trainable lora"),
        (12, {"trainable": "lora"}, "recipes/accelerate/fsdp2.yaml"),
    ],
)
def test_the_first_change_that_fits_is_named(
    gigabytes: int, settings: dict[str, Any], remedy: str | None, large: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(large, gigabytes * GB, launched(), monkeypatch, **settings)
    assert (said is None) == (remedy is None)
    if remedy is not None:
        assert remedy in str(said)
        assert f"{gigabytes} GB are free" in str(said)


def test_several_processes(large: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that divide the weights need less; those that do not divide only the batch."""
    settings = {"trainable": "all", "length": 1024, "batch": 32, "checkpointing": True}
    assert refusal(large, 80 * GB, launched(4), monkeypatch, **settings) is not None
    assert refusal(large, 80 * GB, launched(4, fsdp2=True), monkeypatch, **settings) is None


def test_it_is_refused_before_anything_is_written(
    make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_healing()
    monkeypatch.setattr(memory, "free_memory_of", lambda _: 1000)
    with pytest.raises(TransmlaError, match="this healing needs at least"):
        heal(settings)
    assert not list(Path(settings.output).parent.glob(Path(settings.output).name + "*"))


def test_a_batch_that_ran_is_not_refused(large: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 healed 128 sequences of 512 tokens at once, in an export with the sizes of Qwen2.5-0.5B."""
    monkeypatch.setattr(memory, "parameters", lambda _: 494_000_000)
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    small = replace(large, spec=replace(large.spec, **sizes))
    assert refusal(small, 79 * GB, launched(), monkeypatch, trainable="all", batch=128, length=512) is None


def test_what_may_fit_is_tried(large: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"trainable": "attention", "length": 1024, "batch": 16, "accumulate": 8, "checkpointing": True}
    needed = memory_bytes(large, Load("attention", 2 * 1024, checkpointing=True, half=True))
    assert refusal(large, int(CERTAIN * needed) + 1, launched(), monkeypatch, **settings) is None
    assert refusal(large, int(CERTAIN * needed) - 1, launched(), monkeypatch, **settings) is not None
