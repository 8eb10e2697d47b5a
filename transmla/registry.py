"""Discovery of plug-ins: every module in a plug-in folder adds one family, method, format or backend."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
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
    _refuse_unknown(package, plugins, name, kind)
    return plugins[name]


@cache
def summaries(package: str, attribute: str) -> dict[str, str]:
    """Return the summary of each plug-in by name, read from the source files. Nothing is imported.

    Importing a method or a format imports torch, which takes seconds. A plug-in whose name or summary is not written
    as a constant is imported after all.

    Args:
        package: dotted name of the package, as in ``scan``.
        attribute: name of the module attribute that holds a plug-in.
    """
    spec = importlib.util.find_spec(package)
    found = {}
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in Path(folder).glob("*.py"):
            module = ast.parse(file.read_bytes())
            for plugin in _values(module.body, attribute):
                texts = _constants(module, plugin)
                if not {"name", "summary"} <= texts.keys():
                    return {name: plugin.summary for name, plugin in scan(package, attribute).items()}
                found[texts["name"]] = texts["summary"]
    return dict(sorted(found.items()))


def check_name(package: str, attribute: str, name: str, *, kind: str) -> None:
    """Raise as ``lookup`` does, without importing the plug-ins."""
    _refuse_unknown(package, summaries(package, attribute), name, kind)


def _refuse_unknown(package: str, known: Iterable[str], name: str, kind: str) -> None:
    if name not in known:
        raise TransmlaError(
            f"unknown {kind} '{name}'",
            limit=f"supported: {', '.join(known)}",
            remedy=f"choose one of these, or add a file to {package.replace('.', '/')}/",
        )


def _values(statements: list[ast.stmt], name: str) -> list[ast.expr]:
    """Return the expressions that statements assign to ``name``."""
    plain = [(target, s.value) for s in statements if isinstance(s, ast.Assign) for target in s.targets]
    typed = [(s.target, s.value) for s in statements if isinstance(s, ast.AnnAssign) and s.value]
    return [value for target, value in [*plain, *typed] if isinstance(target, ast.Name) and target.id == name]


def _constants(module: ast.Module, plugin: ast.expr) -> dict[str, str]:
    """Return name and summary of ``plugin``, a call: from its arguments, or from the body of the class it calls."""
    if not isinstance(plugin, ast.Call) or not isinstance(plugin.func, ast.Name):
        return {}
    called = plugin.func.id
    body = next((s.body for s in module.body if isinstance(s, ast.ClassDef) and s.name == called), [])
    values = {key: value for key in ("name", "summary") for value in _values(body, key)}
    values |= dict(zip(("name", "summary"), plugin.args, strict=False))
    values |= {keyword.arg: keyword.value for keyword in plugin.keywords if keyword.arg is not None}
    return {
        key: value.value
        for key, value in values.items()
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    }
