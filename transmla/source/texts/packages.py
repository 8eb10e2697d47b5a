"""Documentation of the installed packages: their descriptions and the docstrings of their modules."""

from __future__ import annotations

import inspect
import random
import re
import zlib
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from typing import Any

from transmla.source.texts.base import TEST, TEST_EVERY, NamedText

# Shortest docstring, in characters, that is prose rather than a label.
SHORTEST = 200
# Characters of a source file that are searched: longer files are generated.
LARGEST = 300_000
# Source files of one package at most, so that no package prevails.
MOST_FILES = 150
# A triple-quoted string that begins a line. Parsing the source would find only docstrings, at forty times the cost.
DOCSTRING = re.compile(r'^[ \t]*[rRuU]?"""(.*?)"""', re.DOTALL | re.MULTILINE)
# Parts of paths that are left out: test suites, and copies of other packages, which may belong to the other split.
LEFT_OUT = ("test", "vendor", "_bundled", "extern")


def _field(package: Distribution, name: str) -> str:
    """Return a field of a package's metadata; empty if the field or the metadata is missing or damaged."""
    try:
        metadata: Any = package.metadata
        return str(metadata.get(name) or "")
    except Exception:  # installs are damaged in many ways, and each finder raises errors of its own
        return ""


def _name(package: Distribution) -> str:
    """Return a package's name, spelt as the index spells names: `Foo_Bar` is `foo-bar`."""
    return re.sub(r"[-_.]+", "-", _field(package, "Name")).lower()


def _files(package: Distribution) -> list[Any]:
    """Return the Python files of a package, sorted; none if the package has no readable list of files."""
    try:
        files = [file for file in package.files or () if file.suffix == ".py"]
    except Exception:  # as in `_field`
        return []
    return sorted((file for file in files if not any(part in str(file).lower() for part in LEFT_OUT)), key=str)


def _docstrings(package: Distribution) -> Iterator[str]:
    """Yield the longer docstrings of a package's modules, functions and classes, each once."""
    files = _files(package)
    random.Random(0).shuffle(files)
    known: set[str] = set()
    for file in files[:MOST_FILES]:
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        for found in DOCSTRING.finditer(source[:LARGEST]):
            text = inspect.cleandoc(found.group(1))
            if len(text) >= SHORTEST and text not in known:
                known.add(text)
                yield text


def _belongs_to_test(name: str) -> bool:
    """Return whether a package belongs to the ``test`` split. Other packages that are installed play no part."""
    return zlib.crc32(name.encode()) % TEST_EVERY == 0


def _pieces(split: str) -> Iterator[str]:
    packages = {_name(package): package for package in distributions()}
    chosen = [packages[name] for name in sorted(packages) if name and _belongs_to_test(name) == (split == TEST)]
    random.Random(0).shuffle(chosen)
    readers = [_docstrings(package) for package in chosen]
    for package in chosen:
        description = _field(package, "Description").strip()
        if len(description) >= SHORTEST:
            yield description + "\n\n"
    while readers:  # a docstring of each package in turn
        for reader in list(readers):
            text = next(reader, None)
            if text is None:
                readers.remove(reader)
            else:
                yield text + "\n\n"


TEXT = NamedText("packages", "documentation: descriptions and docstrings of the installed packages", _pieces)
