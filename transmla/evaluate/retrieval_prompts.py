"""Prompts that hide pass keys in filler text. A seeded grammar writes the filler, so no text needs to be downloaded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transmla.errors import TransmlaError
from transmla.source.text import text_start

# Kinds of prompts, with the number of hidden pairs of city and key. One pair is asked for.
PAIRS = {"passkey": 1, "multi-key": 4}
# Tokens after the prompt, inside the length: a key of five digits takes at most seven in the tokenizers seen.
ANSWER_ROOM = 16

INTRODUCTION = "Remember the pass keys in this text.\n"
PAIR = "The pass key for {city} is {key}.\n"
QUESTION = "The pass key for {city} is"
CITIES = (
    "Berlin", "Paris", "London", "Madrid", "Rome", "Vienna", "Prague", "Warsaw", "Dublin", "Lisbon", "Athens",
    "Oslo", "Cairo", "Delhi", "Tokyo", "Seoul", "Sydney", "Toronto", "Boston", "Chicago", "Denver", "Dallas",
    "Miami", "Lima",
)  # fmt: skip

# The grammar of the filler: "The ADJECTIVE NOUN VERB PREPOSITION the ADJECTIVE NOUN TIME."
ADJECTIVES = ("old", "quiet", "red", "small", "heavy", "young", "cold", "bright", "slow", "gentle", "dusty", "tall")
NOUNS = ("river", "garden", "farmer", "house", "horse", "bridge", "teacher", "forest", "kitchen", "boat", "hill", "cat")
VERBS = ("waited", "rested", "stood", "slept", "moved", "worked", "stayed", "sang", "turned", "lay")
PREPOSITIONS = ("near", "behind", "beside", "under", "above", "before", "beyond", "opposite")
TIMES = ("in the morning", "at noon", "all summer", "for a while", "until evening", "that winter", "every day", "again")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        tokens: token ids [length - ANSWER_ROOM].
        key: the digits that the model must continue with.
        answer_tokens: tokens of the key after the question.
    """

    tokens: tuple[int, ...]
    key: str
    answer_tokens: int


class PromptWriter:
    """Writes prompts for one tokenizer.

    Lines are tokenized one by one. A line ends with a line break, where tokenizers split a text anyway.

    Args:
        tokenizer: the tokenizer of the model that reads the prompts. Prompts begin with BOS where the tokenizer adds
            it.
        longest: length of the longest prompt, in tokens.
        seed: seed of filler, cities, keys and positions.
    """

    def __init__(self, tokenizer: Any, longest: int, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.head = [*text_start(tokenizer), *self._encode(INTRODUCTION)]
        draw = random.Random(f"filler {seed}")
        self.filler: list[list[int]] = []
        tokens = 0
        while tokens < longest:
            self.filler.append(self._encode(filler_line(draw)))
            tokens += len(self.filler[-1])

    def write(self, kind: str, length: int, depth: float, sample: int) -> Prompt:
        """Return one prompt.

        Args:
            kind: a key of ``PAIRS``.
            length: tokens of prompt and ``ANSWER_ROOM``.
            depth: position of the pair that is asked for: 0 at the beginning of the filler, 1 at its end. The pair
                stands at the nearest line break. The other pairs stand at random ones.
            sample: number of the prompt, which selects cities, keys, filler and positions.

        Raises:
            TransmlaError: if ``length`` is too short for the pairs.
        """
        draw = random.Random(f"{self.seed} {kind} {length} {depth} {sample}")
        cities = draw.sample(CITIES, PAIRS[kind])
        keys = [str(key) for key in draw.sample(range(10_000, 100_000), PAIRS[kind])]
        pairs = [self._encode(PAIR.format(city=c, key=k)) for c, k in zip(cities, keys, strict=True)]
        question = self._encode(QUESTION.format(city=cities[0]))
        room = length - ANSWER_ROOM - len(self.head) - len(question) - sum(map(len, pairs))
        if room < 0:
            raise TransmlaError(
                f"a retrieval prompt of {length} tokens is too short",
                limit=f"the pairs and the question of this tokenizer need {length - room}",
                remedy="choose longer prompts by --retrieval-length",
            )
        lines = _exactly(draw.sample(self.filler, len(self.filler)), room)
        starts = [sum(map(len, lines[:i])) for i in range(len(lines) + 1)]
        places = [min(range(len(starts)), key=lambda i: abs(starts[i] - depth * room))]
        places += [draw.randrange(len(starts)) for _ in pairs[1:]]
        tokens = list(self.head)
        for i in range(len(starts)):
            for place, pair in zip(places, pairs, strict=True):
                tokens += pair if place == i else []
            tokens += lines[i] if i < len(lines) else []
        whole = self._encode(QUESTION.format(city=cities[0]) + f" {keys[0]}")
        return Prompt((*tokens, *question), keys[0], len(whole) - len(question))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def filler_line(draw: random.Random) -> str:
    """Return one line of filler, with its line break."""
    words = (ADJECTIVES, NOUNS, VERBS, PREPOSITIONS, ADJECTIVES, NOUNS, TIMES)
    first, noun, verb, preposition, second, other, time = (draw.choice(choices) for choices in words)
    return f"The {first} {noun} {verb} {preposition} the {second} {other} {time}.\n"


def _exactly(lines: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Return the first lines that hold ``tokens`` tokens, cut at the beginning of the first line to be exact."""
    taken: list[list[int]] = []
    total = 0
    for line in lines:
        if total >= tokens:
            break
        taken.append(line)
        total += len(line)
    surplus = total - tokens
    while surplus:
        cut = min(surplus, len(taken[0]))
        taken[0] = taken[0][cut:]
        surplus -= cut
        if not taken[0]:
            taken.pop(0)
    return taken
