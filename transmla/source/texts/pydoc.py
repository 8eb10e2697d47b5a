"""The prose of CPython's help topics."""

from __future__ import annotations

import re
from collections.abc import Iterator

from transmla.source.texts.base import TEST, TEST_EVERY, TRAIN, NamedText


def pydoc_text(split: str) -> str:
    """Return one split of CPython's help topics, with every paragraph once.

    In alphabetical order, every fifth topic belongs to the ``test`` split, the others to ``train``. A paragraph that
    occurs in both splits belongs to ``test``.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    test_names = names[::TEST_EVERY]
    paragraphs: dict[str, list[str]] = {TEST: [], TRAIN: []}
    known: set[str] = set()
    # Compare letters only: topics quote each other with other footnote numbers, markup and indentation.
    for name in test_names + [name for name in names if name not in test_names]:
        for paragraph in re.split(r"\n\s*\n", topics[name].strip("\n")):
            letters = "".join(filter(str.isalpha, paragraph)).lower()
            if letters not in known:
                known.add(letters)
                paragraphs[TEST if name in test_names else TRAIN].append(paragraph)
    return "\n\n".join(paragraphs[split]) + "\n"


def _pieces(split: str) -> Iterator[str]:
    yield pydoc_text(split)


TEXT = NamedText("pydoc", "documentation: the help topics that CPython ships", _pieces)
