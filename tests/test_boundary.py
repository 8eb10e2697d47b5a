"""The boundary explains errors of the system; bugs pass through, whatever their words."""

from __future__ import annotations

import errno
import re
import tomllib
from pathlib import Path

import pytest
import torch

from transmla.boundary import explain, local_path
from transmla.errors import REQUIREMENTS, TransmlaError, missing_package


def test_a_full_disk_is_explained_in_the_words_of_python_and_torch() -> None:
    with pytest.raises(RuntimeError) as torchs:
        torch.save({"a": torch.zeros(10**6)}, "/dev/full")
    for error in (OSError(errno.ENOSPC, "No space left on device", "x"), torchs.value):
        explained = explain(error)
        assert explained is not None
        assert "the disk is full" in str(explained)


@pytest.mark.parametrize("bug", [TypeError("got an unexpected positional argument"), KeyError("x"), ValueError("y")])
def test_a_bug_is_not_explained(bug: Exception) -> None:
    assert explain(bug) is None


def test_a_missing_path_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert local_path(tmp_path / "missing") == tmp_path / "missing"
    assert local_path(tmp_path / "file" / "below") == tmp_path / "file" / "below"
    with pytest.raises(TransmlaError, match="no name of this length"):
        local_path("x" * 300)


def test_a_missing_package_is_named_as_the_project_requires_it() -> None:
    """transmla is installed from a checkout: `pip install transmla[EXTRA]` would look for it on PyPI."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = {requirement for extra in project["optional-dependencies"].values() for requirement in extra}
    assert set(REQUIREMENTS.values()) <= extras
    error = missing_package("drawing needs matplotlib", "matplotlib")
    assert str(error) == 'drawing needs matplotlib; it is not installed; pip install "matplotlib>=3.9"'


def test_no_hint_names_a_package_index_that_lacks_transmla() -> None:
    root = Path(__file__).parents[1]
    files = [*root.glob("transmla/**/*.py"), *root.glob("docs/*.md"), root / "README.md"]
    assert not [file for file in files if re.search(r"pip install .{0,20}transmla\[", file.read_text(encoding="utf-8"))]
