"""Writing the export: one shard a layer, every file whole or absent, the folder renamed at the end."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.errors import TransmlaError
from transmla.fingerprint import file_sha256

PROGRESS = "progress.json"
MANIFEST = "transmla.json"
CARD = "README.md"
VERIFICATION = "verification.json"
_CALIBRATION = "calibration.safetensors"
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into an error that says what is left and how to go on."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full:
            raise
        raise TransmlaError(
            f"the disk that holds '{folder}' is full",
            limit="what was written so far is kept",
            remedy="free some space and run the same command with --resume",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], *, sync: bool = True) -> None:
    """Write a safetensors file so that it is there whole or not at all.

    Without ``sync`` that holds for a crash of the program only, not of the machine.
    """
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"})
    if sync:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    temporary.replace(path)


class Workspace:
    """The unfinished folder ``OUTPUT.partial``: shards done, the hidden stream, and how far it got.

    Opening one refuses to touch anything that another run left, unless it is to be resumed and was made by
    the same plan from the same weights (``key``).
    """

    def __init__(self, output: Path, shards: int) -> None:
        self.output, self.shards = output, shards
        self.folder = output.with_name(output.name + ".partial")

    def refuse_overwrite(self, *, resume: bool) -> None:
        """Refuse an output that is taken; writes nothing.

        Raises:
            TransmlaError: the output is not empty, or an unfinished run is there and not to be resumed.
        """
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise TransmlaError(
                f"output '{self.output}' is not empty",
                limit="nothing is ever overwritten",
                remedy="choose another --output, or delete it",
            )
        if self.folder.exists() and not resume:
            raise TransmlaError(
                f"an unfinished run is in '{self.folder}'",
                limit="nothing is ever overwritten",
                remedy="continue it with --resume, or delete it",
            )

    def open(self, key: str) -> dict[str, Any]:
        """Create or reopen the folder; returns the progress so far.

        Raises:
            TransmlaError: an unfinished run with another key.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for cut_off in self.folder.glob("*.tmp"):
            cut_off.unlink()
        file = self.folder / PROGRESS
        if not file.is_file():
            progress: dict[str, Any] = {"key": key, "next_layer": 0, "layers": [], "hashes": {}}
            write_json(file, progress)
            return progress
        progress = json.loads(file.read_text())
        if progress["key"] != key:
            raise TransmlaError(
                f"'{self.folder}' was begun with other weights, settings or versions",
                limit="a resumed conversion must end in the same bytes",
                remedy="repeat the command it was begun with, or delete it",
            )
        return progress

    def size(self) -> int:
        """Bytes that an unfinished run has written."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def save_progress(self, progress: dict[str, Any]) -> None:
        write_json(self.folder / PROGRESS, progress)

    def tokens(self) -> Tensor | None:
        """The calibration tokens of an earlier run, if they were written."""
        from safetensors.torch import load_file

        file = self.folder / _CALIBRATION
        return load_file(file)["tokens"] if file.is_file() else None

    def save_tokens(self, tokens: Tensor) -> None:
        write_tensors(self.folder / _CALIBRATION, {"tokens": tokens})

    def save_streams(self, layer: int, streams: dict[str, Tensor]) -> int:
        """Keep what enters ``layer``; returns its checksum."""
        # Streams are large and short-lived; their checksum tells whether they survived.
        streams = {name: tensor.cpu() for name, tensor in streams.items()}
        write_tensors(self._streams(layer), streams, sync=False)
        return _checksum(streams)

    def streams(self, layer: int, checksum: int) -> dict[str, Tensor]:
        """What was saved for ``layer``.

        Raises:
            TransmlaError: if they are not what was saved (a crash of the machine, not of the program).
        """
        from safetensors.torch import load_file

        file = self._streams(layer)
        streams = load_file(file) if file.is_file() else {}
        if _checksum(streams) != checksum:
            raise TransmlaError(
                f"'{file}' is damaged", limit="a conversion resumes from it", remedy=f"delete '{self.folder}'"
            )
        return streams

    def drop_streams(self, *, keep: int | None = None) -> None:
        """Remove all saved streams but those that enter layer ``keep``."""
        for file in self.folder.glob("stream-*"):
            if keep is None or file != self._streams(keep):
                file.unlink()

    def _streams(self, layer: int) -> Path:
        return self.folder / f"stream-{layer:05d}.safetensors"

    def shard_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"

    def write_shard(self, index: int, tensors: dict[str, Tensor]) -> str:
        """Write shard ``index``; returns its SHA-256."""
        path = self.folder / self.shard_name(index)
        write_tensors(path, tensors)
        return file_sha256(path)

    def finish(self) -> None:
        """Remove what only a resume needs, and give the folder its name."""
        # Progress goes last: without it a resumed run would take whatever tokens it finds.
        for file in (*self.folder.glob("stream-*"), self.folder / _CALIBRATION, self.folder / PROGRESS):
            file.unlink(missing_ok=True)
        if self.output.exists():
            self.output.rmdir()
        self.folder.replace(self.output)


def _checksum(streams: dict[str, Tensor]) -> int:
    total = 0
    for name in sorted(streams):
        total = zlib.crc32(streams[name].contiguous().view(torch.uint8).numpy().data, total)
    return total


def write_index(folder: Path) -> None:
    """``model.safetensors.index.json`` over the shards in ``folder``."""
    from safetensors import safe_open

    weight_map: dict[str, str] = {}
    total = 0
    for shard in sorted(folder.glob("model-*-of-*.safetensors")):
        with safe_open(shard, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                weight_map[name] = shard.name
                tensor = handle.get_slice(name)
                width = 4 if tensor.get_dtype() == "F32" else 2
                total += width * int(torch.tensor(tensor.get_shape()).prod())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def write_tokenizer(folder: Path, source: Path, tokenizer: Any, *, copy: bool, generation: Any) -> None:
    """Tokenizer, chat template and generation config: the source's files, or made from a GGUF's metadata."""
    if copy:
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if (source / "chat_templates").is_dir():
            shutil.copytree(source / "chat_templates", folder / "chat_templates", dirs_exist_ok=True)
        _keep_class(folder, tokenizer)
    else:
        tokenizer.save_pretrained(folder)
        generation.save_pretrained(folder)


def _keep_class(folder: Path, tokenizer: Any) -> None:
    """Name the class of ``tokenizer`` in ``folder``, where transformers would take another for a model of this type."""
    from transformers import AutoTokenizer

    from transmla.auto import register

    register()
    if type(AutoTokenizer.from_pretrained(folder)) is not type(tokenizer):
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        write_json(file, settings | {"tokenizer_class": type(tokenizer).__name__})


def hash_files(folder: Path, known: dict[str, str]) -> dict[str, str]:
    """SHA-256 of every file a reader relies on: all but the card and the manifest itself."""
    skipped = {MANIFEST, CARD, PROGRESS, _CALIBRATION, VERIFICATION}
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in skipped)
    names = [p.relative_to(folder).as_posix() for p in files if not p.name.startswith("stream-")]
    return {name: known.get(name) or file_sha256(folder / name) for name in names}
