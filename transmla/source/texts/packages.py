"""Documentation of the installed packages: their descriptions and the docstrings of their modules."""

from __future__ import annotations

import ast
import random
import warnings
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions

from transmla.source.texts.base import TEST, TEST_EVERY, NamedText

# Shortest docstring, in characters, that is prose rather than a label.
SHORTEST = 200
# Largest source file, in bytes, that is parsed: larger ones are generated.
LARGEST = 300_000
# Source files of one package at most, so that no package prevails.
MOST_FILES = 150


def _name(package: Distribution) -> str:
    return (package.metadata["Name"] or "").lower()


def _docstrings(package: Distribution) -> Iterator[str]:
    """Yield the longer docstrings of a package's modules, functions and classes, each once."""
    files = [file for file in package.files or () if file.suffix == ".py" and "test" not in str(file).lower()]
    files.sort(key=str)
    random.Random(0).shuffle(files)
    known: set[int] = set()
    for file in files[:MOST_FILES]:
        try:
            source = file.read_text(encoding="utf-8")
            if len(source) > LARGEST:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= SHORTEST and hash(text) not in known:
                    known.add(hash(text))
                    yield text


def _pieces(split: str) -> Iterator[str]:
    packages = sorted({_name(package): package for package in distributions()}.items())
    chosen = [package for i, (_, package) in enumerate(packages) if (i % TEST_EVERY == 0) == (split == TEST)]
    random.Random(0).shuffle(chosen)
    readers = [_docstrings(package) for package in chosen]
    for package in chosen:
        description = str(package.metadata.json.get("description") or "").strip()
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
