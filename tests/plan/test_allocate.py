"""The division of one cache among layers."""

from __future__ import annotations

import itertools
import random

import pytest

from transmla.plan.allocate import Rung, falling_caches


def total(layers: list[list[Rung]], division: tuple[int, ...]) -> tuple[int, float]:
    chosen = [rungs[k] for rungs, k in zip(layers, division, strict=True)]
    return sum(rung.values for rung in chosen), sum(rung.cost for rung in chosen)


def convex(generator: random.Random) -> list[Rung]:
    """A layer whose cost rises ever faster while its cache falls."""
    steps = sorted(generator.random() for _ in range(4))
    costs = [0.0, *itertools.accumulate(steps)]
    return [Rung(100 - 20 * k, cost) for k, cost in enumerate(costs)]


@pytest.mark.parametrize("seed", range(5))
def test_each_division_is_the_cheapest_of_its_cache(seed: int) -> None:
    generator = random.Random(seed)
    layers = [convex(generator) for _ in range(4)]
    every = [total(layers, division) for division in itertools.product(range(5), repeat=4)]
    divisions = falling_caches(layers)
    assert divisions[0] == (0, 0, 0, 0)
    assert divisions[-1] == (4, 4, 4, 4)
    for division in divisions:
        values, cost = total(layers, division)
        assert cost <= min(c for v, c in every if v <= values) + 1e-12


def test_the_cache_falls_with_every_division() -> None:
    layers = [convex(random.Random(k)) for k in range(6)]
    values = [total(layers, division)[0] for division in falling_caches(layers)]
    assert values == sorted(values, reverse=True)
    assert len(values) == len(set(values))


def test_an_insensitive_layer_shrinks_first() -> None:
    cheap, dear = [Rung(100, 0.0), Rung(50, 0.01)], [Rung(100, 0.0), Rung(50, 1.0)]
    assert falling_caches([dear, cheap]) == [(0, 0), (0, 1), (1, 1)]


def test_a_size_above_the_hull_is_skipped() -> None:
    bump = [Rung(100, 0.0), Rung(80, 5.0), Rung(60, 5.5), Rung(40, 6.0)]
    assert falling_caches([bump]) == [(0,), (3,)]


def test_a_smaller_cache_that_measured_a_lower_cost_counts_as_equal() -> None:
    noisy = [Rung(100, 0.2), Rung(80, 0.1), Rung(60, 0.5)]
    assert falling_caches([noisy]) == [(0,), (1,), (2,)]


def test_one_size_has_one_division() -> None:
    assert falling_caches([[Rung(10, 1.0)], [Rung(10, 2.0)]]) == [(0, 0)]
