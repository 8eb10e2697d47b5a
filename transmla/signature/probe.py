"""Seeded inputs, and projections of a model's outputs onto seeded directions.

All seeded numbers come from numpy's ``RandomState``, whose stream never changes between versions. Shapes: T tokens,
D hidden size, N rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

# Tokens of the seeded inputs. Every expert of a mixture should receive some of them.
TOKENS = 32
# Tokens whose logits are not signed. Rounding to bfloat16 changes the logits of the first 13 tokens of
# Qwen2.5-Coder-0.5B by up to 140 % of their size, before an attention sink has formed, and those of later tokens by at
# most 8 %.
UNSETTLED = 16
# Rows are dealt to this many groups, each with a direction of its own. A token that a router sends to another expert,
# because two experts are nearly equal, then changes one projection and not all.
GROUPS = 4
# Smallest root mean square of a seeded hidden state; the largest is 1. Small states show the eps of a norm.
SMALLEST = 0.03
# Numbers that are projected at once.
NUMBERS = 2**23
# Significant digits of a recorded projection.
DIGITS = 9


@dataclass(frozen=True)
class Projections:
    """Projections of some rows, one for each group.

    Attributes:
        values: the projections.
        sizes: norm of the rows of each group; a projection has about this size.
    """

    values: list[float]
    sizes: list[float]

    def rounded(self) -> list[float]:
        """Return the projections as the manifest records them."""
        return [float(f"{value:.{DIGITS}g}") for value in self.values]

    def deviations(self, recorded: list[float]) -> list[float]:
        """Return, for each group, the distance to the ``recorded`` projection as a fraction of the group's norm.

        The result is [infinity] if another number of projections is recorded.
        """
        if len(recorded) != len(self.values):
            return [float("inf")]
        pairs = zip(self.values, recorded, self.sizes, strict=True)
        return [abs(value - before) / max(size, 1e-30) for value, before, size in pairs]


def hidden_states(width: int) -> Tensor:
    """Return seeded hidden states [1, T, D] for the input of any decoder layer, in float32."""
    numbers = np.random.RandomState(1)
    states = numbers.standard_normal((TOKENS, width))
    sizes = SMALLEST ** numbers.uniform(size=(TOKENS, 1))
    return torch.from_numpy(states * sizes).float()[None]


def tokens(vocabulary: int) -> Tensor:
    """Return seeded token ids [1, T] below ``vocabulary``."""
    return torch.from_numpy(np.random.RandomState(2).randint(0, vocabulary, (1, TOKENS)))


def project_logits(logits: Tensor) -> Projections:
    """Project the logits [T, vocabulary] of the seeded tokens, without those of the first ``UNSETTLED`` tokens."""
    return project(logits[UNSETTLED:])


def project(rows: Tensor) -> Projections:
    """Project ``rows`` [N, D] onto the seeded directions of their groups, in float64. Row n is in group n mod 4."""
    directions, factors = _directions(rows.shape[1]), np.random.RandomState(4)
    values, squares = torch.zeros(GROUPS, dtype=torch.float64), torch.zeros(GROUPS, dtype=torch.float64)
    for start, part in _parts(rows):
        weighted = part.detach().double().cpu() * torch.from_numpy(factors.standard_normal((len(part), 1)))
        group = torch.arange(start, start + len(part)) % GROUPS
        projected = (weighted @ directions.mT).gather(1, group[:, None])[:, 0]
        values.index_add_(0, group, projected)
        squares.index_add_(0, group, weighted.square().sum(1))
    return Projections(values.tolist(), squares.sqrt().tolist())


def _parts(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    count = max(1, NUMBERS // rows.shape[1])
    for start in range(0, len(rows), count):
        yield start, rows[start : start + count]


@cache
def _directions(width: int) -> Tensor:
    """Return one direction for each group, [groups, D] in float64."""
    return torch.from_numpy(np.random.RandomState(3).standard_normal((GROUPS, width)))
