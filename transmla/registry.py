"""Discovery of plug-ins: every module in a plug-in folder adds one family, method, format or backend."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from transmla.errors import TransmlaError


@cache
def scan(package: str, attribute: str) -> dict[str, Any]:
    """Import all modules of a package and collect one object from each.

    Args:
        package: dotted name of the package, for example ``transmla.families``.
        attribute: name of the module attribute to collect, for example ``FAMILY``. Modules without it are skipped.

    Returns:
        The objects, keyed by their ``name`` and sorted by it.
    """
    folder = importlib.import_module(package)
    modules = (importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(folder.__path__))
    plugins = [getattr(module, attribute) for module in modules if hasattr(module, attribute)]
    return {plugin.name: plugin for plugin in sorted(plugins, key=lambda plugin: plugin.name)}


def lookup(package: str, attribute: str, name: str, *, kind: str) -> Any:
    """Return the plug-in called ``name``.

    Args:
        package: dotted name of the package to scan.
        attribute: name of the module attribute that holds a plug-in.
        name: ``name`` of the plug-in.
        kind: word for the plug-in in the error message, for example "method".

    Raises:
        TransmlaError: if no plug-in has this name. The message lists the available names.
    """
    plugins = scan(package, attribute)
    if name not in plugins:
        raise TransmlaError(
            f"unknown {kind} '{name}'",
            limit=f"supported: {', '.join(plugins)}",
            remedy=f"choose one of these, or add a file to {package.replace('.', '/')}/",
        )
    return plugins[name]
