"""Layers with equal frequencies share the angles of a captured step."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.graph_models import LONG, longer, plain_model
from torch.utils._python_dispatch import TorchDispatchMode

from transmla.modeling.modeling_transmla import Frequencies
from transmla.runtime.graphable import Snapshot
from transmla.runtime.shared_frequencies import SharedFrequencies


class Counted(TorchDispatchMode):
    """Numbers of operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.numbers[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek_v3"])
def test_angles_are_computed_once(family: str, tmp_path: Path) -> None:
    model = plain_model(family, tmp_path)
    tokens, numbers = longer(model, LONG), []
    expected = model(tokens).logits
    for part in (Snapshot(model).frequencies.used(), nullcontext()):
        with part, Counted() as counted:
            assert torch.equal(model(tokens).logits, expected)
        numbers.append(counted.numbers["cos"])
    # The model itself computes angles for the source's attention. A native export has no others.
    assert numbers == ([1, 1] if family == "deepseek_v3" else [2, 5])
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_different_frequencies_and_positions_are_kept_apart() -> None:
    kinds: list[dict[str, Any]] = [
        {"inv_freq": [1.0, 0.5], "qk_rope_head_dim": 4, "attention_factor": factor} for factor in (1.0, 1.0, 2.0)
    ]
    modules = [Frequencies(kind) for kind in kinds]
    positions = torch.arange(3)[None], torch.arange(3)[None] + 1
    with SharedFrequencies(modules).used():
        found = [[module(p)[0] for p in positions] for module in modules]
    assert found[0][0] is found[1][0]
    for module, row in zip(modules, found, strict=True):
        for p, cosines in zip(positions, row, strict=True):
            assert torch.equal(cosines, module(p)[0])
