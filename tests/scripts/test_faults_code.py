"""Code in every place of a source does not run; the same code runs where transformers is told to trust it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("faults_code")


def test_planted_code_does_not_run(script: ModuleType, sources: Path) -> None:
    found = list(script.attempts(sources, verbs=("load",), exports=False))
    assert len(found) == 2 * len(script.IN_SOURCE)
    assert not [attempt for attempt in found if attempt.ran or attempt.outcome in script.fuzz_run.FAULTS]


def test_code_that_runs_is_noticed(script: ModuleType, sources: Path) -> None:
    ran, _ = script._attempt(sources, "llama", lambda _, mark: mark.touch(), ["families"], b"")
    assert ran
    folder, mark = Path(shutil.copytree(sources / "llama", sources / "trusted")), sources / script.MARK
    (folder / "mine.py").write_text(script.MODULE.format(mark=str(mark)))
    script.IN_SOURCE["config"](folder, mark)
    trusting = "import sys, transformers; transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    variables = os.environ | {"HF_MODULES_CACHE": str(sources / "modules")}
    subprocess.run([sys.executable, "-c", trusting, str(folder)], env=variables, check=True)
    assert mark.exists()
