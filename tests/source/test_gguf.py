"""GGUF files: unpacked once, not at all if too large, and refused if their tokenizer is rebuilt wrongly."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import cached_assets_path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transmla.errors import TransmlaError
from transmla.source import gguf
from transmla.source.gguf_copies import ORIGIN
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


def in_another_process(file: Path) -> None:
    """Use ``file`` in a process that has ended."""
    process = os.fork()
    if process == 0:
        resolve_source(str(file))
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0


@pytest.mark.parametrize("change", ["deleted", "moved", "changed", "folder deleted"])
def test_a_copy_whose_file_is_gone_is_removed(
    file: Path, unpacks: list[Path], tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "old").mkdir()
    old, living = tmp_path / "old" / "old.gguf", tmp_path / "living.gguf"
    for other in (old, living):
        other.write_bytes(file.read_bytes())
        in_another_process(other)
    cache = resolve_source(str(file)).parent
    assert f"unpacked '{file.name}' once, for later commands too: 0.0 GB in '{cache}" in caplog.text
    copies = set(cache.iterdir())
    assert len(copies) == 3
    if change == "deleted":
        old.unlink()
    elif change == "moved":
        old.rename(tmp_path / "elsewhere.gguf")
    elif change == "changed":
        old.write_bytes(b"GGUF" + bytes(300))
    else:
        shutil.rmtree(old.parent)
    caplog.clear()
    kept = {resolve_source(str(living)), resolve_source(str(file))}
    assert set(cache.iterdir()) == copies  # nothing was unpacked
    assert not caplog.text
    new = tmp_path / "new.gguf"
    new.write_bytes(file.read_bytes())
    kept.add(resolve_source(str(new)))
    assert set(cache.iterdir()) == kept


def test_a_copy_that_another_process_uses_stays(file: Path, unpacks: list[Path], tmp_path: Path) -> None:
    reading, done = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        resolve_source(str(file))
        os.write(reading[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(reading[0], 1)
    cache = next((tmp_path / "assets").rglob("config.json")).parents[1]
    [copy] = cache.iterdir()
    file.unlink()
    other, third = tmp_path / "other.gguf", tmp_path / "third.gguf"
    other.write_bytes(b"GGUF" + bytes(50))
    unpacked = resolve_source(str(other))
    assert set(cache.iterdir()) == {copy, unpacked}
    os.write(done[1], b"x")
    os.waitpid(process, 0)
    third.write_bytes(b"GGUF" + bytes(60))
    resolve_source(str(third))
    assert not copy.exists()


@pytest.mark.parametrize("origin", ["", "{", "[]", "{}", '{"path": 3}', '{"path": "a\\u0000b"}', None])
def test_a_folder_that_says_nothing_of_its_file_stays(file: Path, unpacks: list[Path], origin: str | None) -> None:
    cache = resolve_source(str(file)).parent
    (cache / "broken").mkdir()
    (cache / "file").touch()
    if origin is not None:
        (cache / "broken" / ORIGIN).write_text(origin)
    file.write_bytes(b"GGUF" + bytes(70))
    assert resolve_source(str(file)).is_dir()
    assert (cache / "broken").is_dir()
    assert (cache / "file").is_file()


def test_what_a_killed_process_began_to_unpack_is_removed(file: Path, unpacks: list[Path]) -> None:
    cache = resolve_source(str(file)).parent
    begun = cache / "tmpbegun"
    begun.mkdir()
    (begun / ORIGIN).write_text(json.dumps(gguf.origin_of(file)))
    (begun / "model.safetensors").touch()
    file.write_bytes(b"GGUF" + bytes(70))
    resolve_source(str(file))
    assert not begun.exists()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("call", "index"), [("unlink", 0), ("unlink", 1), ("unlink", 2), ("rmdir", 0)])
def test_a_file_that_comes_back_has_a_whole_copy_after_a_killed_removal(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, index: int, backwards: bool
) -> None:
    """As the file of a disk that was not mounted for a while; its copy is removed in any order."""

    def unpack(_: Path, folder: Path) -> None:
        for name in ("model.safetensors", "config.json"):
            (folder / name).write_text("{}")

    monkeypatch.setattr(gguf, "_unpack", unpack)
    in_another_process(file)
    away, other = file.rename(tmp_path / "away.gguf"), tmp_path / "other.gguf"
    other.write_bytes(b"GGUF" + bytes(70))
    process = os.fork()
    if process == 0:
        listed, real, calls = Path.iterdir, getattr(Path, call), iter(range(100))

        def dying(path: Path, **kwargs: Any) -> None:
            if next(calls) == index:
                os._exit(0)
            real(path, **kwargs)

        monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path), reverse=backwards)))
        monkeypatch.setattr(Path, call, dying)
        resolve_source(str(other))
        os._exit(1)
    assert os.waitpid(process, 0)[1] == 0
    away.rename(file)
    folder = resolve_source(str(file))
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", ORIGIN}


def test_a_cache_that_cannot_be_written_is_used_as_it_is(
    file: Path, unpacks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, other = tmp_path / "gone.gguf", tmp_path / "other.gguf"
    for path in (gone, other):
        path.write_bytes(file.read_bytes())
    in_another_process(gone)
    gone.unlink()
    folder = resolve_source(str(file))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("unlink", "rmdir", "write_text"):
        monkeypatch.setattr(Path, name, refuse)
    for name in ("shutil.rmtree", "tempfile.mkdtemp"):
        monkeypatch.setattr(name, refuse)
    assert resolve_source(str(file)) == folder
    assert resolve_source(str(other)) == other


def test_a_copy_that_another_process_removes_meanwhile_is_not_used(
    file: Path, unpacks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That process has seen the file changed or gone, and this one has seen it back."""
    in_another_process(file)
    monkeypatch.setattr(gguf, "use_copy", shutil.rmtree)
    assert resolve_source(str(file)) == file


def test_a_copy_is_used_once_its_removal_has_ended(file: Path, unpacks: list[Path]) -> None:
    in_another_process(file)
    [copy] = next(file.parent.rglob("unpacked")).iterdir()
    began, process = os.pipe(), os.fork()
    if process == 0:
        handle = os.open(copy, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.write(began[1], b"x")
        time.sleep(0.2)
        shutil.rmtree(copy)
        os._exit(0)
    os.read(began[0], 1)
    assert resolve_source(str(file)) == file
    assert os.waitpid(process, 0)[1] == 0


def test_a_cache_that_cannot_be_listed_is_used(
    file: Path, unpacks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "copy_bytes", lambda _: 0)
    monkeypatch.setattr(Path, "iterdir", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert resolve_source(str(file)) != file
    assert unpacks == [file]


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
