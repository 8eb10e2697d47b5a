"""A tiny source, its finished export, and working directories for further runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.conversions import recipe, write_source, write_text

from transmla.convert.pipeline import convert


@pytest.fixture(scope="module")
def single_thread() -> Iterator[None]:
    """Use one thread: threads slow small matrices down, and subprocesses must add numbers in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("transmla.convert.shard_writer.SAVE_SECONDS", 0)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original(single_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a source, its calibration text and the export of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("original")
    write_source(folder / "source")
    write_text(folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        convert(recipe())
    return folder


@pytest.fixture
def workdir(tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a working directory with links to the same source and text, and no export."""
    for name in ("source", "text.txt"):
        (tmp_path / name).symlink_to(original / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
