"""Register the transmla format when transformers is imported, without a call.

The installed file ``transmla_autoload.pth`` makes Python import this module when it starts. So this module imports the
standard library alone, and waits until transformers' table of config classes is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# The module of transformers that holds the table.
TABLE = "transformers.models.auto.configuration_auto"


class _Waiting(importlib.abc.MetaPathFinder):
    """Finder that registers the format as soon as ``TABLE`` has been imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Return the spec of ``TABLE`` with a loader that registers the format; None for all other modules."""
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loader = None if spec is None else spec.loader
        if loader is None:
            return None
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """Register the format; a transformers that transmla does not support stays as it is."""
    try:
        from transmla.modeling.registration import register
    except ImportError:
        return
    register()


def wait() -> None:
    """Register the format now if transformers has imported its table, or else when it does."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


wait()
