"""Fixtures of the command line's tests: tiny sources in a working directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny_sources import build_model, build_tokenizer


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``source`` in one shard, ``many`` in many, ``mqa`` with one key head, and a text."""
    folder = tmp_path_factory.mktemp("originals")
    for name, layout, size in (("source", "gqa", "1GB"), ("many", "gqa", "20KB"), ("mqa", "mqa", "1GB")):
        build_model(layout=layout).save_pretrained(folder / name, max_shard_size=size)
        build_tokenizer(folder / name)
    picks = torch.randint(0, 26, (1000,), generator=torch.Generator().manual_seed(1))
    (folder / "text.txt").write_text(" ".join(chr(97 + int(i)) for i in picks))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def place(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with its own copy of everything."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
