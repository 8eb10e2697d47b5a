"""Batches whose sequences have different lengths: the division into pieces, and the merge of the pieces.

Without a GPU, both kernels run in Triton's interpreter. The decode kernel that reads the division needs a Hopper GPU.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

import pytest
import torch
from helpers.decode_cases import DEVICE, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transmla.kernels import ragged, splits
from transmla.kernels.splits import PART_COST, PROGRAM_COST, merge_pieces

if ragged.triton is None:
    pytest.skip("needs triton", allow_module_level=True)

TOKENS = 16


def ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def best_length(tiles: list[int], units: int, blocks: int) -> int:
    """The piece length with the lowest estimated time, by trying all of them."""
    longest, extra = max(*tiles, 1), 2 * max(1, units // blocks)
    most = sum(t > 0 for t in tiles) + extra
    fewest = ceil_div(ceil_div(sum(ceil_div(2 * t, longest) for t in tiles), 2) * blocks, units)
    counts = {length: [sum(ceil_div(n * t, length) for t in tiles) for n in (2, 1)] for length in range(1, longest + 1)}
    costs = []
    for rounds in range(fewest, fewest + ragged.ROUNDS):
        places = rounds * units // blocks
        length = next(L for L, (halves, count) in counts.items() if halves <= 2 * places and count <= most)
        parts = sum(n for n in (ceil_div(t, length) for t in tiles) if n > 1)
        costs.append((rounds * (length + PROGRAM_COST) + PART_COST * parts * blocks / units, rounds, length))
    return min(costs)[2]


def last_end(loads: list[float], units: int, blocks: int) -> float:
    """Time at which the last of the programs ends, each on the first free multiprocessor, in the order of the list."""
    free = [0.0] * units
    for load in loads:
        for _ in range(blocks):
            heapq.heappush(free, heapq.heappop(free) + load)
    return max(free)


def estimate(loads: list[int], parts: int, units: int, blocks: int) -> float:
    """Time of programs with ``loads`` tiles and of the merge of ``parts`` results, in tiles."""
    return last_end([load + PROGRAM_COST for load in loads], units, blocks) + PART_COST * parts * blocks / units


def divided(lengths: list[int], units: int, blocks: int, bounds: Tensor | None = None) -> ragged.Division:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "multiprocessors", lambda _: units)
        patch.setattr(torch, "empty", poisoned(torch.empty))
        rows = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        return ragged.divide(len(lengths), blocks, TOKENS, max(*lengths, 1), rows, bounds)


def check(division: ragged.Division, begins: list[int], tiles: list[int], units: int, blocks: int) -> None:
    """Check that the pieces cover every tile once, are not too long, and are balanced."""
    slots, pieces = division.slots.tolist(), division.pieces.tolist()
    used = [slot for slot in slots if slot[1] < slot[2]]
    assert slots[: len(used)] == used
    assert all(slot == [0, 0, 0, 0] for slot in slots[len(used) :])
    length = best_length(tiles, units, blocks)
    parts = 0
    for sequence, (begin, count) in enumerate(zip(begins, tiles, strict=True)):
        own = sorted(slot[1:] for slot in used if slot[0] == sequence)
        assert [tile for first, last, _ in own for tile in range(first, last)] == list(range(begin, begin + count))
        assert pieces[sequence][1] == len(own) == ceil_div(count, length)
        assert all(last - first <= length for first, last, _ in own)
        if len(own) > 1:
            assert pieces[sequence][0] == parts
            assert [part for *_, part in own] == list(range(parts, parts + len(own)))
            parts += len(own)
        else:
            assert all(part == -1 for *_, part in own)
    assert parts <= division.parts
    loads = [last - first for _, first, last, _ in used]
    large = [2 * load > length for load in loads]
    assert large == sorted(large, reverse=True)
    rounds = ceil_div(ceil_div(sum(1 + big for big in large), 2) * blocks, units)
    if units % blocks == 0:
        assert last_end(loads, units, blocks) <= rounds * length


TILES = st.lists(st.one_of(st.integers(0, 4), st.integers(0, 200)), min_size=2, max_size=40)


@settings(max_examples=60, deadline=None)
@given(TILES, st.sampled_from([4, 13, 132]), st.sampled_from([1, 2, 3, 40]), st.data())
def test_the_pieces_cover_every_tile_once(tiles: list[int], units: int, blocks: int, data: st.DataObject) -> None:
    lengths = [max(0, t * TOKENS - data.draw(st.integers(0, TOKENS - 1), label="unused")) for t in tiles]
    check(divided(lengths, units, blocks), [0] * len(tiles), tiles, units, blocks)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 2500)), min_size=2, max_size=40))
def test_the_pieces_of_visible_ranges(ranges: list[tuple[int, int]]) -> None:
    """The range of a sequence starts at any token; a sequence that sees no token has the range of ``_mask_bounds``."""
    bounds = [[begin, begin + count, -1, -1] if count else [0, 0, -1, -1] for begin, count in ranges]
    begins = [begin // TOKENS for begin, *_ in bounds]
    tiles = [ceil_div(end, TOKENS) - first for (_, end, *_), first in zip(bounds, begins, strict=True)]
    ends = [end for _, end, *_ in bounds]
    rows = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    check(divided(ends, 13, 1, rows), begins, tiles, 13, 1)


@pytest.mark.parametrize("units", [13, 132])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("batch", [2, 8, 32, 100])
def test_the_division_is_as_fast_as_equal_splits(
    batch: int, blocks: int, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimated time is at most 5 % and 2 tiles above that of equal splits; 15 % if all lengths are equal."""
    monkeypatch.setattr(splits, "multiprocessors", lambda _: units)
    generator = torch.Generator().manual_seed(batch)
    for spread in (0.0, 2.0, 5.0):
        tiles = (400 * 2 ** (-spread * torch.rand(batch, generator=generator))).int().tolist()
        count = splits.best_splits.__wrapped__(batch * blocks, max(tiles), DEVICE)
        equal = [(s + 1) * t // count - s * t // count for t in tiles for s in range(count)]
        division = divided([t * TOKENS for t in tiles], units, blocks)
        pieces = [last - first for _, first, last, _ in division.slots.tolist() if first < last]
        parts = sum(part >= 0 for *_, part in division.slots.tolist()[: len(pieces)])
        ours = estimate(pieces, parts, units, blocks)
        theirs = estimate(equal, len(equal) if count > 1 else 0, units, blocks)
        assert ours <= theirs * (1.05 if spread else 1.15) + 2, (spread, ours, theirs)


def test_the_measured_batch_is_balanced() -> None:
    """32 sequences of 1K to 128K tokens, in tiles of 64, take little longer than equal ones with as many tokens."""
    tiles = [round(16 * 128 ** (i / 31)) for i in range(32)]
    for blocks in (1, 2):
        times = []
        for lengths in (tiles, [sum(tiles) // 32] * 32):
            slots = divided([t * TOKENS for t in lengths], 132, blocks).slots.tolist()
            used = [last - first for _, first, last, _ in slots if first < last]
            times.append(estimate(used, sum(part >= 0 for *_, part in slots[: len(used)]), 132, blocks))
        assert times[1] > 0.9 * times[0]


def test_the_largest_batch() -> None:
    tiles = [i % 97 for i in range(ragged.MAX_BATCH)]
    division = divided([t * TOKENS for t in tiles], 132, 1)
    check(division, [0] * len(tiles), tiles, 132, 1)


def test_lengths_of_any_stride() -> None:
    columns = torch.tensor([[96, 5], [4000, 5], [0, 5]], dtype=torch.int32, device=DEVICE)
    strided = ragged.divide(3, 1, TOKENS, 4000, columns[:, 0], None)
    dense = ragged.divide(3, 1, TOKENS, 4000, columns[:, 0].contiguous(), None)
    assert torch.equal(strided.slots, dense.slots)
    assert torch.equal(strided.pieces, dense.pieces)


def test_when_sequences_may_differ() -> None:
    lengths, mask = torch.tensor([4, 7], dtype=torch.int32), torch.ones(2, 1, 1, 7, dtype=torch.bool)
    assert ragged.differ(2, lengths, None)
    assert ragged.differ(2, None, mask)
    assert ragged.differ(2, lengths[:1].expand(2), mask)
    assert not ragged.differ(2, None, None)
    assert not ragged.differ(2, lengths[:1].expand(2), mask[:1].expand(2, 1, 1, 7))
    assert not ragged.differ(1, lengths[:1], mask[:1])
    assert not ragged.differ(ragged.MAX_BATCH + 1, lengths, mask)


def merged_cases() -> Iterator[list[int]]:
    yield [0, 1, 2]
    yield [9, 0, 8, 1, 20]


@pytest.mark.parametrize("counts", merged_cases(), ids=str)
@pytest.mark.parametrize("rank", [16, 96, 512])
def test_the_merge_of_pieces(counts: list[int], rank: int) -> None:
    """Against float64; unused partial results are NaN, and a sequence with one piece keeps its result."""
    generator = torch.Generator().manual_seed(rank)
    rows, batch, unused = 3, len(counts), 2
    first = torch.tensor([0, *(n if n > 1 else 0 for n in counts)]).cumsum(0)
    total = int(first[-1])
    parts = torch.randn(total + unused, rows, rank, generator=generator)
    part_lse = torch.randn(total + unused, rows, generator=generator) * 20
    parts[total:], part_lse[total:] = math.nan, math.nan
    # Pieces that saw no token, and a row of queries that saw none.
    part_lse[:total:3, 0], parts[:total:3, 0] = -math.inf, 0
    part_lse[:total, 1], parts[:total, 1] = -math.inf, 0
    out, lse = torch.full((batch, 1, rows, rank), 7.0), torch.full((batch, 1, rows), 7.0)
    pieces = torch.stack([first[:-1], torch.tensor(counts)], 1).int()
    arguments = [t.to(DEVICE) for t in (parts, part_lse, pieces, out, lse)]
    merge_pieces(*arguments)
    out, lse = (t.cpu() for t in arguments[3:])
    for b, count in enumerate(counts):
        if count == 1:
            assert (out[b] == 7).all()
            assert (lse[b] == 7).all()
            continue
        own = slice(int(first[b]), int(first[b]) + count)
        logs = part_lse[own].double() * math.log(2)
        expected = logs.logsumexp(0)
        shares = (logs - expected.clamp_min(-1e300)).exp()
        assert torch.allclose(lse[b, 0].double(), expected, atol=1e-5)
        assert torch.allclose(out[b, 0].double(), (shares[..., None] * parts[own].double()).sum(0), atol=1e-5)
