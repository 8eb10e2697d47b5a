"""Code in every place of a source does not run; the same code runs where transformers is told to trust it."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module. The variables that it sets do not outlive these tests."""
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("faults_code")


@pytest.fixture(scope="module")
def root(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of tiny sources."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "runs").mkdir()
    script.fuzz_run.preload()
    script.fuzz_run.build_sources(folder)
    return folder


def test_planted_code_does_not_run(script: ModuleType, root: Path) -> None:
    found = list(script.attempts(root, verbs=("load",), exports=False))
    assert len(found) == 2 * len(script.IN_SOURCE)
    assert not [attempt for attempt in found if attempt.ran or attempt.outcome in script.fuzz_run.FAULTS]


def test_code_that_runs_is_noticed(script: ModuleType, root: Path) -> None:
    ran, _ = script._attempt(root, "llama", lambda _, mark: mark.touch(), ["families"], b"")
    assert ran
    folder, mark = Path(shutil.copytree(root / "llama", root / "trusted")), root / script.MARK
    (folder / "mine.py").write_text(script.MODULE.format(mark=str(mark)))
    script.IN_SOURCE["config"](folder, mark)
    trusting = "import sys, transformers; transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    variables = os.environ | {"HF_MODULES_CACHE": str(root / "modules")}
    subprocess.run([sys.executable, "-c", trusting, str(folder)], env=variables, check=True)
    assert mark.exists()
