"""What a named text is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

TRAIN, TEST = "train", "test"
# Every fifth document of a named text belongs to its ``test`` split.
TEST_EVERY = 5


@dataclass(frozen=True)
class NamedText:
    """A text that this machine has, with the splits ``train`` and ``test``.

    Attributes:
        name: the name by which options take it.
        summary: what it holds, in a few words.
        pieces: yields consecutive pieces of one split on demand.
    """

    name: str
    summary: str
    pieces: Callable[[str], Iterator[str]]
