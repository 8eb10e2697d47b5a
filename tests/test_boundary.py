"""The boundary explains errors of the system; bugs pass through, whatever their words."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from transmla.boundary import explain, local_path
from transmla.errors import TransmlaError


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
