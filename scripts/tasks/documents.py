"""Documents of the offline tasks in this folder, built from the functions of Python's standard library.

The documents depend on the version of Python: compare scores of one version only.
"""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Callable
from typing import Any

from datasets import Dataset, DatasetDict

MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "codecs", "collections", "contextlib", "copy", "csv",
    "datetime", "decimal", "difflib", "functools", "gettext", "glob", "gzip", "hashlib", "heapq", "hmac",
    "html", "inspect", "io", "ipaddress", "itertools", "json", "linecache", "locale", "logging", "lzma",
    "mimetypes", "operator", "os", "pathlib", "pickle", "platform", "plistlib", "pprint", "queue", "random",
    "re", "secrets", "shelve", "shlex", "shutil", "signal", "socket", "sqlite3", "ssl", "statistics",
    "string", "struct", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize",
    "traceback", "types", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref",
    "xml.etree.ElementTree", "zipfile",
)  # fmt: skip
# Documents that serve as examples in the prompts, and are not scored.
EXAMPLES = 16
# Choices per document of `python_summary`.
CHOICES = 4
# Longest signature, in characters.
LONGEST = 200


def defaults(**_: Any) -> DatasetDict:
    """Questions for the default value of one parameter of a signature: signature, parameter, default."""
    draw, documents = random.Random(0), []
    for name, function in _functions():
        parameters = inspect.signature(function).parameters.values()
        plain = [p for p in parameters if type(p.default) in (bool, int, float, str, type(None))]
        listed = ", ".join(f"{p.name}={p.default!r}" if p in plain else p.name for p in parameters)
        values = {repr(p.default) for p in plain}
        # With one value among all defaults, the question would not need the parameter's name.
        if len(values) > 1 and len(listed) <= LONGEST:
            asked = draw.choice(plain)
            documents.append(
                {"signature": f"{name}({listed})", "parameter": asked.name, "default": repr(asked.default)}
            )
    return _splits(documents)


def summaries(**_: Any) -> DatasetDict:
    """Questions for the summary of a function, among the summaries of others: name, choices, answer."""
    draw = random.Random(0)
    summary = {name: (inspect.getdoc(function) or "").partition("\n")[0] for name, function in _functions()}
    summary = {name: text for name, text in summary.items() if 30 <= len(text) <= 90 and text.endswith(".")}
    documents = []
    for name, text in summary.items():
        others = [other for other in sorted(set(summary.values())) if other != text]
        choices = draw.sample(others, CHOICES - 1)
        answer = draw.randrange(CHOICES)
        documents.append({"name": name, "choices": [*choices[:answer], text, *choices[answer:]], "answer": answer})
    return _splits(documents)


def _functions() -> list[tuple[str, Callable[..., Any]]]:
    """Return the public functions and classes of ``MODULES`` that have a signature, with their full names."""
    found = []
    for module in map(importlib.import_module, MODULES):
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not callable(value) or getattr(value, "__module__", None) != module.__name__:
                continue
            try:
                inspect.signature(value)
            except (TypeError, ValueError):
                continue
            found.append((f"{module.__name__}.{name}", value))
    return found


def _splits(documents: list[dict[str, Any]]) -> DatasetDict:
    """Return a shuffled split ``test``, and a split ``train`` of ``EXAMPLES`` other documents."""
    random.Random(1).shuffle(documents)
    parts = {"train": documents[:EXAMPLES], "test": documents[EXAMPLES:]}
    return DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()})
