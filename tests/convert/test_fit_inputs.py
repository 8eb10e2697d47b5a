"""Inputs of a fit are joined from calibration text."""

from __future__ import annotations

import torch

from transmla.convert.fit_inputs import JITTER, FitInputs

LENGTH = 32


def make_inputs() -> FitInputs:
    generator = torch.Generator().manual_seed(0)
    source, drift = (torch.randn(9, LENGTH, 8, generator=generator) for _ in range(2))
    return FitInputs(source, 0.1 * drift, 2)


def test_inputs_are_joined_from_the_calibration_text() -> None:
    """Tokens keep their positions and move by at most JITTER of their norm; each keeps a share of its drift."""
    inputs = make_inputs()
    rows, shares = torch.tensor([[3, 8], [5, 5]]), torch.tensor([0.0, 1.0])
    source, converted = inputs.make(rows, torch.tensor([10]), shares, torch.tensor([3, 40]))
    pieces = torch.stack([torch.cat([inputs.source[3, :10], inputs.source[8, 10:]]), inputs.source[5]])
    moved = (source - pieces).norm(dim=-1)
    assert bool((moved <= JITTER * pieces.norm(dim=-1) * 1.001).all())
    assert bool((moved[:, 1:] > 0).any())
    assert torch.equal(converted[0], source[0])
    assert torch.allclose(converted[1] - source[1], inputs.drift[5], atol=1e-5)


def test_equal_seeds_give_equal_inputs() -> None:
    first, second, other = (make_inputs().draw(5, seed) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
