"""Devices that do not exist are refused in words of transmla."""

from __future__ import annotations

import pytest
import torch

from transmla.errors import TransmlaError
from transmla.source.device import pick_device


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, version: str | None = "12.8") -> None:
    """Let torch be built for CUDA ``version`` and see ``count`` GPUs."""
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("name", "count", "version", "says"),
    [
        ("cuda", 0, None, "this PyTorch is a build for CPUs; use --device cpu, or leave it out"),
        ("cuda:7", 0, None, "this PyTorch is a build for CPUs"),
        ("cuda", 0, "12.8", "PyTorch finds no GPU; use --device cpu"),
        ("cuda:7", 2, "12.8", "the GPUs of this machine are cuda:0, cuda:1; use"),
        ("mps", 0, None, "PyTorch finds no GPU of a Mac"),
        ("xla", 0, None, "this PyTorch cannot use such devices"),
        ("meta", 0, None, "its tensors hold no values"),
        ("abacus", 0, None, "a device is auto, cpu, cuda, cuda:1, …; correct --device, or leave it out"),
        ("", 0, None, "a device is auto"),
        ("1", 2, "12.8", "a device is auto, cpu, cuda, cuda:1, …; write cuda:1, or leave it out"),
    ],
)
def test_a_device_that_does_not_exist_is_refused(
    name: str, count: int, version: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, count, version)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(TransmlaError) as refused:
        pick_device(name)
    assert f"device '{name}' is not usable; {says}" in str(refused.value)


def test_the_processor_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    assert {pick_device(name) for name in ("auto", "cpu", "cpu:3")} == {torch.device("cpu")}
