"""The source code of Python's standard library."""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from transmla.source.texts.base import TEST, TEST_EVERY, NamedText

# Folders that are not the standard library's own code, test suites, tables of encodings, and the text ``pydoc``.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
# Files below this size in bytes are mostly imports.
SMALLEST = 1024


def stdlib_files(split: str) -> list[Path]:
    """Return the source files of one split, in an order that does not depend on the machine.

    In alphabetical order, every fifth file belongs to the ``test`` split. The order of a split is shuffled, because
    neighbouring files are alike and readers take only the beginning of a long text.
    """
    files = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # os.walk does not enter the others
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files = [path for path in files if path.is_file() and path.stat().st_size >= SMALLEST]  # links may be broken
    files.sort(key=lambda path: path.as_posix())
    chosen = [path for index, path in enumerate(files) if (index % TEST_EVERY == 0) == (split == TEST)]
    random.Random(0).shuffle(chosen)
    return chosen


def _pieces(split: str) -> Iterator[str]:
    for path in stdlib_files(split):
        yield path.read_text(encoding="utf-8", errors="ignore") + "\n\n"


TEXT = NamedText("stdlib", "code: the source of Python's standard library", _pieces)
