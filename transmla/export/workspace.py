"""Writing the export: one shard a layer, every file whole or absent, the folder renamed at the end."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.errors import TransmlaError
from transmla.export.files import write_json, write_tensors
from transmla.export.hashes import CALIBRATION, PROGRESS, file_sha256


@dataclass
class Progress:
    """How far an unfinished conversion got.

    Attributes:
        key: hash of everything that a resumed run must share with this one.
        next_layer: first layer that is not written, or whose streams are not saved.
        layers: the manifest's records of the layers so far.
        hashes: SHA-256 of the shards so far.
        checksum: of the saved streams.
        final_norm: correction of the last norm, once all layers are written.
    """

    key: str
    next_layer: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    checksum: int = 0
    final_norm: float | None = None


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

    def open(self, key: str) -> Progress:
        """Create or reopen the folder; returns the progress so far.

        Raises:
            TransmlaError: if another run left its work there: one with another ``key``.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for cut_off in self.folder.glob("*.tmp"):
            cut_off.unlink()
        file = self.folder / PROGRESS
        if not file.is_file():
            progress = Progress(key)
            self.save_progress(progress)
            return progress
        progress = Progress(**json.loads(file.read_text()))
        if progress.key != key:
            raise TransmlaError(
                f"'{self.folder}' was begun with other weights, settings or versions",
                limit="a resumed conversion must end in the same bytes",
                remedy="repeat the command it was begun with, or delete it",
            )
        return progress

    def size(self) -> int:
        """Bytes that an unfinished run has written."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def save_progress(self, progress: Progress) -> None:
        """Write how far the run got."""
        write_json(self.folder / PROGRESS, asdict(progress))

    def tokens(self) -> Tensor | None:
        """The calibration tokens of an earlier run, if they were written."""
        from safetensors.torch import load_file

        file = self.folder / CALIBRATION
        return load_file(file)["tokens"] if file.is_file() else None

    def save_tokens(self, tokens: Tensor) -> None:
        write_tensors(self.folder / CALIBRATION, {"tokens": tokens})

    def save_streams(self, layer: int, streams: dict[str, Tensor]) -> int:
        """Keep what enters ``layer``; returns its checksum."""
        # Streams are large and short-lived; their checksum tells whether they survived.
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
        for file in (*self.folder.glob("stream-*"), self.folder / CALIBRATION, self.folder / PROGRESS):
            file.unlink(missing_ok=True)
        if self.output.exists():
            self.output.rmdir()
        self.folder.replace(self.output)


def _checksum(streams: dict[str, Tensor]) -> int:
    total = 0
    for name in sorted(streams):
        total = zlib.crc32(streams[name].contiguous().view(torch.uint8).numpy().data, total)
    return total
