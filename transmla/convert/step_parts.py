"""Divide one step of a fit among processes."""

from __future__ import annotations

from dataclasses import dataclass

from transmla.plan.fit_settings import parts_of_step
from transmla.ranks import Ranks
from transmla.token_split import TokenSplit


@dataclass(frozen=True)
class StepPart:
    """The part of a step's inputs that one process computes.

    Attributes:
        weight: the part's share of the step's tokens.
        rows: the input sequences.
        split: the tokens of these sequences; None means all.
    """

    weight: float
    rows: slice
    split: TokenSplit | None

    @property
    def place(self) -> tuple[slice, slice]:
        """The sequences of the part, and the tokens of these sequences."""
        return self.rows, slice(None) if self.split is None else self.split.tokens


def part_of_step(ranks: Ranks, rows: int, length: int, heads: int) -> StepPart:
    """Return this process's part of a step with ``rows`` sequences of ``length`` tokens, for ``heads`` query heads.

    The sequences are divided if the processes then have equally many. Otherwise the tokens are divided. If there are
    fewer tokens or heads than processes, each process computes the whole step.
    """
    if rows % ranks.size == 0:
        return StepPart(1 / ranks.size, ranks.share(rows), None)
    if parts_of_step(ranks.size, rows, length, heads) == 1:
        return StepPart(1 / ranks.size, slice(None), None)
    split = TokenSplit(ranks, length)
    return StepPart((split.tokens.stop - split.tokens.start) / length, slice(None), split)
