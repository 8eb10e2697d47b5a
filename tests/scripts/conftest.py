"""Scripts as modules, and the tiny sources that they damage."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest


@pytest.fixture(scope="module")
def load_script() -> Iterator[Callable[[str], ModuleType]]:
    """Return a script as a module. The variables that it sets do not outlive the tests of one file."""
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def sources(load_script: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of ``fuzz_run.build_sources``: tiny sources and a text."""
    fuzz_run, folder = load_script("fuzz_run"), tmp_path_factory.mktemp("sources")
    (folder / "runs").mkdir()
    fuzz_run.preload()
    fuzz_run.build_sources(folder)
    return folder
