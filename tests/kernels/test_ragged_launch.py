"""The launch of a divided batch, on a CPU: plain PyTorch takes the place of the two Gluon kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.decode_cases import DEVICE, GPU, case, compare
from torch import Tensor

from transmla.kernels import hopper, hopper_kernel

if hopper.gluon is None or GPU:
    pytest.skip("needs triton >= 3.6, and no GPU: there the kernels themselves are tested", allow_module_level=True)

TOTAL = 6000
LENGTHS = [TOTAL, 1, 0, 64, 1300, 65, 2]


class Kernel:
    """A function in place of a kernel; ``kernel[grid](**arguments)`` calls it."""

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self.run(grid, SimpleNamespace(**arguments))


def visible(a: SimpleNamespace, batch: int) -> Tensor:
    """Which rows each new token of a sequence may attend to, [n, T]."""
    keys = torch.arange(a.total)
    seen = torch.ones(a.NEW, a.total, dtype=torch.bool)
    if a.MASKED:
        seen &= a.mask[batch, 0] != 0
    if a.RAGGED:
        seen &= keys < (int(a.lengths[batch]) - a.NEW + 1 + torch.arange(a.NEW))[:, None]
    return seen


def find_bounds(grid: tuple[int, ...], a: SimpleNamespace) -> None:
    for batch in range(grid[0]):
        length = int(a.lengths[batch]) if a.RAGGED else a.total
        shown = (a.mask[batch, 0, :, :length] != 0).any(0).nonzero()
        a.bounds[batch] = torch.tensor([int(shown[0]), int(shown[-1]) + 1, 0, 0] if len(shown) else [0, 0, 0, 0])


def attend(grid: tuple[int, ...], a: SimpleNamespace) -> None:
    assert a.DIVIDED
    assert grid == (math.ceil(a.rows / hopper.ROWS), len(a.slots), 1)
    used = a.slots[a.slots[:, 1] < a.slots[:, 2]]
    assert (used[:, 3] < 0).any()
    assert (used[:, 3] >= 0).any()
    for batch, first, last, part in a.slots.tolist():
        if first == last:
            continue
        at = slice(first * a.TOKENS, last * a.TOKENS)
        latents, rotary = (t.base[batch, at].float().nan_to_num(0) for t in (a.kv, a.pe))
        scores = (a.q_latent[batch].float() @ latents.T + a.q_pe[batch].float() @ rotary.T) * a.scale
        scores = scores.masked_fill(~visible(a, batch)[:, None, at], float("-inf"))
        lse = scores.mul(math.log(2)).logsumexp(-1)
        out = (scores * math.log(2) - lse.clamp_min(-1e30)[..., None]).exp() @ latents
        if part < 0:
            a.out[batch], a.lse[batch] = out, lse / math.log(2) * a.LOG
        else:
            a.parts[part], a.part_lse[part] = out.flatten(0, 1), lse.flatten() / math.log(2)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, run in ((hopper_kernel, "attend", attend), (hopper, "find_bounds", find_bounds)):
        monkeypatch.setattr(module, name, Kernel(run))
    monkeypatch.setattr(hopper, "LONG_QUEUE", 0)


@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("heads", [3, 70])
@pytest.mark.parametrize("kind", ["lengths", "mask", "both"])
def test_results_of_whole_and_of_cut_sequences(kind: str, heads: int, new: int) -> None:
    c = case(batch=len(LENGTHS), new=new, heads=heads, total=TOTAL, rank=32, width=16, dtype=torch.float16)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    keys, last = torch.arange(TOTAL), torch.arange(new)[:, None] + TOTAL - new
    extra: dict[str, Any] = {"lengths": lengths}
    if kind == "mask":
        extra = {"mask": (keys >= TOTAL - lengths[:, None, None, None]) & (keys <= last)}
    if kind == "both":
        padding = (5900 - lengths).clamp(0)[:, None, None, None]
        extra = {"mask": keys >= padding, "lengths": torch.full((1,), 5900, dtype=torch.int32).expand(len(LENGTHS))}
    compare(hopper, c, **extra)
