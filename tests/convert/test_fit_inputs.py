"""Inputs of a fit are joined from calibration text."""

from __future__ import annotations

import torch

from transmla.convert.fit_inputs import JITTER, SHORT, FitInputs, kinds_of_steps, sizes_of_steps

LENGTH = 32


def make_inputs() -> FitInputs:
    generator = torch.Generator().manual_seed(0)
    source, drift = (torch.randn(9, LENGTH, 8, generator=generator) for _ in range(2))
    return FitInputs(source, 0.1 * drift, 2, LENGTH)


def test_inputs_are_joined_from_the_calibration_text() -> None:
    """Tokens keep their positions and move by at most JITTER of their norm; each keeps a share of its drift."""
    inputs = make_inputs()
    rows, shares = torch.tensor([[3, 8], [5, 5]]), torch.tensor([0.0, 1.0])
    gaps = torch.tensor([0, 0])
    source, converted, positions = inputs.make(rows, torch.tensor([10]), gaps, shares, torch.tensor([3, 40]))
    assert torch.equal(positions, torch.arange(LENGTH))
    pieces = torch.stack([torch.cat([inputs.source[3, :10], inputs.source[8, 10:]]), inputs.source[5]])
    moved = (source - pieces).norm(dim=-1)
    assert bool((moved <= JITTER * pieces.norm(dim=-1) * 1.001).all())
    assert bool((moved[:, 1:] > 0).any())
    assert torch.equal(converted[0], source[0])
    assert torch.allclose(converted[1] - source[1], inputs.drift[5], atol=1e-5)


def test_equal_seeds_give_equal_inputs() -> None:
    first, second, other = (make_inputs().draw(5, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_parts_of_inputs_are_parts_of_all() -> None:
    inputs = make_inputs()
    arguments = [table[3] for table in inputs.draw(5, torch.Generator().manual_seed(7))]
    whole = inputs.make(*arguments)
    for part in ((slice(1, 2), slice(None)), (slice(None), slice(5, 19)), (slice(0, 1), slice(30, 32))):
        source, converted, positions = inputs.make(*arguments, part=part)
        assert torch.equal(source, whole[0][part])
        assert torch.equal(converted, whole[1][part])
        assert torch.equal(positions, whole[2][part[1]])


def test_short_steps_show_long_distances() -> None:
    """A short row starts at the sequence's first token; its tokens keep their positions, which have gaps."""
    generator = torch.Generator().manual_seed(0)
    count, length = 3, 4 * SHORT
    source = torch.arange(length, dtype=torch.float32)[None, :, None].expand(count, -1, 2).clone()
    whole, short = sizes_of_steps(source, torch.zeros_like(source), 2 * SHORT)
    assert (whole.rows, whole.length, short.rows, short.length) == (1, length, 2, SHORT)
    rows, cuts, gaps, shares, _ = short.draw(50, generator)
    ends = []
    for step in range(50):
        # A displacement of zero length leaves the tokens in place.
        shifts = torch.zeros(2, dtype=torch.int64)
        inputs, _, positions = short.make(rows[step], cuts[step], gaps[step], shares[step], shifts)
        assert positions[0] == 0
        assert bool((positions.diff() >= 1).all())
        assert torch.equal(inputs[0, :, 0], positions.float())
        ends.append(int(positions[-1]))
    assert max(ends) < length
    assert max(ends) > 3 * SHORT > 1.5 * SHORT > min(ends)


def test_a_quarter_of_the_steps_takes_whole_sequences() -> None:
    assert kinds_of_steps(8, 2) == [1, 1, 1, 0, 1, 1, 1, 0]
    assert kinds_of_steps(3, 1) == [0, 0, 0]
    short = torch.zeros(4, 2 * SHORT - 1, 2)
    assert len(sizes_of_steps(short, short, 4096)) == 1
