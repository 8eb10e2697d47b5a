"""Divide one cache among layers, by what each layer's cache is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Rung:
    """One size of one layer.

    Attributes:
        values: cached values per token.
        cost: what the size costs, such as a KL in nats per token.
    """

    values: int
    cost: float


def falling_caches(layers: Sequence[Sequence[Rung]]) -> list[tuple[int, ...]]:
    """Return the best division of every total cache, from the largest to the smallest.

    Each step shrinks the layer that loses least for each value that it gives up. For costs that add up, each division
    is the cheapest one of its total cache; sizes that lie above the lower convex hull of a layer's costs are skipped.

    Args:
        layers: the sizes of every layer, with falling ``values``. Costs that fall with the cache count as equal.

    Returns:
        Divisions: for every layer the index of its size.
    """
    steps = []
    for index, rungs in enumerate(layers):
        hull = _hull(rungs)
        for larger, smaller in pairwise(hull):
            saved = rungs[larger].values - rungs[smaller].values
            slope = (_cost(rungs, smaller) - _cost(rungs, larger)) / saved
            steps.append((slope, index, smaller))
    # Slopes of one layer rise along its hull, so its steps stay in order. Equal slopes: the earlier size first.
    current = [0] * len(layers)
    divisions = [tuple(current)]
    for _, index, rung in sorted(steps):
        current[index] = rung
        divisions.append(tuple(current))
    return divisions


def _cost(rungs: Sequence[Rung], index: int) -> float:
    """Return the cost of a size: no less than that of any larger size."""
    return max(rung.cost for rung in rungs[: index + 1])


def _hull(rungs: Sequence[Rung]) -> list[int]:
    """Return the indices of the sizes on the lower convex hull of cost over cache, largest cache first."""
    hull: list[int] = []
    for i in range(len(rungs)):
        while len(hull) >= 2 and _slope(rungs, hull[-2], i) <= _slope(rungs, hull[-2], hull[-1]):
            hull.pop()
        hull.append(i)
    return hull


def _slope(rungs: Sequence[Rung], larger: int, smaller: int) -> float:
    """Return the cost of each value that is given up between two sizes."""
    return (_cost(rungs, smaller) - _cost(rungs, larger)) / (rungs[larger].values - rungs[smaller].values)
