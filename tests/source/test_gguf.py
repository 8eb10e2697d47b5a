"""GGUF files: unpacked once, not at all if too large, and refused if their tokenizer is rebuilt wrongly."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import cached_assets_path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transmla.errors import TransmlaError
from transmla.source import gguf
from transmla.source.locate import resolve_source


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that looks like GGUF, with an empty cache."""
    assets = partial(cached_assets_path, assets_dir=tmp_path / "assets")
    monkeypatch.setattr("huggingface_hub.cached_assets_path", assets)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


@pytest.fixture
def unpacks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were unpacked; unpacking writes a config only."""
    done: list[Path] = []

    def unpack(path: Path, folder: Path) -> None:
        done.append(path)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_unpack", unpack)
    return done


def test_a_file_is_unpacked_once_until_it_changes(file: Path, unpacks: list[Path]) -> None:
    folder = resolve_source(str(file))
    assert (folder / "config.json").is_file()
    assert resolve_source(str(file)) == folder
    assert unpacks == [file]
    file.write_bytes(b"GGUF" + bytes(200))
    assert resolve_source(str(file)) != folder
    assert len(unpacks) == 2
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, resolve_source(str(file)).name}


def test_a_large_file_stays_packed(file: Path, unpacks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "LARGEST", 50)
    assert resolve_source(str(file)) == file
    assert unpacks == []


def test_a_full_disk_leaves_the_file_packed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_unpack", full)
    assert resolve_source(str(file)) == file
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    assert gguf._cache_folder(file) is None


def test_a_damaged_file_is_an_error_of_one_line_and_leaves_nothing(file: Path, tmp_path: Path) -> None:
    with pytest.raises(TransmlaError, match=r"'model.gguf' cannot be read as GGUF"):
        resolve_source(str(file))
    assert list((tmp_path / "assets").rglob("config.json")) == []
    assert [path.name for path in (tmp_path / "assets").rglob("tmp*")] == []


def words(*tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary has "the" as a token, and which makes the ``tokens`` only."""
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "▁the", *tokens])}
    bpe = Tokenizer(models.BPE({**vocabulary}, [], unk_token="[UNK]"))
    if "▁a" in tokens:
        bpe = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_a_tokenizer_that_splits_its_words_is_refused(file: Path) -> None:
    gguf.check_words(words("▁a"), file)
    with pytest.raises(TransmlaError, match=r"rebuilds the tokenizer of 'model.gguf' wrongly; it splits 'the'"):
        gguf.check_words(words("t", "h", "e"), file)
