"""The Hopper kernel on divided batches, against the reference in float64. Needs a Hopper GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.decode_cases import DEVICE, KERNELS, SCALING, Case, case, compare
from torch import Tensor

from transmla.kernels import hopper, ragged
from transmla.kernels.rows import Rows, Scores

if hopper not in KERNELS:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

LENGTHS = [4097, 1, 0, 64, 1000, 65, 2048, 3, 700]
# Widths of the latent and of the rotary key, and query heads.
SHAPES = [(512, 64, 5), (512, 64, 40), (512, 64, 70), (96, 32, 16)]
SHAPE_NAMES = ["{}+{}, {} heads".format(*shape) for shape in SHAPES]


@pytest.fixture(autouse=True)
def divisions(monkeypatch: pytest.MonkeyPatch) -> list[ragged.Division]:
    """Divide batches of any size, and list the divisions."""
    made: list[ragged.Division] = []
    divide = ragged.divide

    def listed(*arguments: Any) -> ragged.Division:
        made.append(divide(*arguments))
        return made[-1]

    monkeypatch.setattr(hopper, "LONG_QUEUE", 0)
    monkeypatch.setattr(ragged, "divide", listed)
    return made


def batch_of(shape: tuple[int, int, int], new: int, dtype: torch.dtype = torch.float16, total: int = 4097) -> Case:
    rank, width, heads = shape
    return case(batch=len(LENGTHS), new=new, heads=heads, total=total, rank=rank, width=width, dtype=dtype)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def left_padding(total: int, new: int) -> Tensor:
    """A causal mask [B, 1, n, T] whose sequences have ``LENGTHS`` visible rows; one of them has a hole."""
    keys, last = torch.arange(total, device=DEVICE), torch.arange(new, device=DEVICE)[:, None] + total - new
    mask = (keys >= total - int32(LENGTHS)[:, None, None, None]) & (keys <= last)
    mask[4, ..., 3500:3700] = False
    return mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("new", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_lengths(shape: tuple[int, int, int], new: int, dtype: torch.dtype, divisions: list[ragged.Division]) -> None:
    c = batch_of(shape, new, dtype)
    for b, length in enumerate(LENGTHS):
        c.kv_c[b, length:], c.k_pe[b, length:] = float("nan"), float("nan")
    compare(hopper, c, lengths=int32(LENGTHS))
    assert len(divisions) == 1
    assert int((divisions[0].pieces[:, 1] > 1).sum()) >= 1


@pytest.mark.parametrize("new", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_left_padding(shape: tuple[int, int, int], new: int, divisions: list[ragged.Division]) -> None:
    compare(hopper, batch_of(shape, new), mask=left_padding(4097, new))
    assert len(divisions) == 1


@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_left_padding_and_equal_lengths(
    shape: tuple[int, int, int], new: int, divisions: list[ragged.Division]
) -> None:
    """A captured step has both: its buffer is longer than its sequences."""
    c = batch_of(shape, new)
    c.kv_c[:, 3000:], c.k_pe[:, 3000:] = float("nan"), float("nan")
    keys = torch.arange(4097, device=DEVICE)
    mask = keys >= 3000 - int32(LENGTHS).clamp(max=3000)[:, None, None, None]
    compare(hopper, c, mask=mask, lengths=int32([3000]).expand(len(LENGTHS)))
    assert len(divisions) == 1


@pytest.mark.parametrize("new", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_pages(shape: tuple[int, int, int], new: int, divisions: list[ragged.Division]) -> None:
    page, count = 128, 33
    c, lengths = batch_of(shape, new, total=page * count), int32(LENGTHS)
    order = torch.randperm(len(LENGTHS) * count, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    behind = torch.arange(page * count, device=DEVICE)[None, :, None] >= lengths[:, None, None]
    pages = torch.empty(len(order), page, shape[0] + shape[1], dtype=torch.float16, device=DEVICE)
    pages[order] = torch.cat([c.kv_c, c.k_pe], -1).masked_fill(behind, float("nan")).view(pages.shape)
    latents, rotary = pages[..., : shape[0]], pages[..., shape[0] :]
    compare(hopper, Case(c.q_latent, c.q_pe, latents, rotary), lengths=lengths, block_table=order.view(-1, count))
    assert len(divisions) == 1


def test_equal_lengths_are_not_divided(divisions: list[ragged.Division]) -> None:
    c = batch_of(SHAPES[1], 1)
    c.decode(hopper, lengths=int32([4000]).expand(len(LENGTHS)))
    c.decode(hopper, mask=left_padding(4097, 1)[:1])
    assert not divisions


def test_a_captured_call_divides_the_lengths_of_its_replay() -> None:
    c, lengths = batch_of(SHAPES[1], 1), int32([1000] * len(LENGTHS))
    rows = Rows(c.kv_c, c.k_pe, lengths=lengths)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        hopper.decode(c.q_latent, c.q_pe, rows, Scores(SCALING))
    stream.synchronize()
    with torch.cuda.graph(graph):
        captured = hopper.decode(c.q_latent, c.q_pe, rows, Scores(SCALING))
    for values in (LENGTHS, LENGTHS[::-1]):
        lengths.copy_(int32(values))
        graph.replay()
        expected = hopper.decode(c.q_latent, c.q_pe, rows, Scores(SCALING))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, expected, strict=True))
