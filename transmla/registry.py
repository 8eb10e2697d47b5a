"""Plug-ins found by scanning their folder: one new file is one new family, method or backend."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from transmla.errors import TransmlaError


@cache
def scan(package: str, attribute: str) -> dict[str, Any]:
    """All objects named ``attribute`` in the modules of ``package``, keyed by their ``name``, sorted."""
    folder = importlib.import_module(package)
    modules = (importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(folder.__path__))
    found = [getattr(module, attribute) for module in modules if hasattr(module, attribute)]
    return {item.name: item for item in sorted(found, key=lambda item: item.name)}


def lookup(package: str, attribute: str, name: str, *, kind: str) -> Any:
    """The plug-in called ``name``, or a refusal that lists those there are."""
    known = scan(package, attribute)
    if name not in known:
        raise TransmlaError(
            f"unknown {kind} '{name}'",
            limit=f"supported: {', '.join(known)}",
            remedy=f"choose one of these, or add a file to {package.replace('.', '/')}/",
        )
    return known[name]
