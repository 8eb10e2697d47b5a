"""Manage the folder of an unfinished conversion: write shards, save the state for a resume, rename it at the end."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.boundary import boundary, read_json_object
from transmla.errors import TransmlaError
from transmla.export.hashes import CALIBRATION, PROGRESS, UNFINISHED_SUFFIX, file_sha256
from transmla.export.lock import lock_folder, unlock_folder
from transmla.export.output import refuse_taken
from transmla.export.state import differences, key_of, other_run, read_state, write_state
from transmla.export.unfinished import first_damaged, refuse_foreign, refuse_no_folder, remove_if_empty
from transmla.files import remove_temporaries, write_tensors

# What a resumed conversion must have in common with the run that it continues.
_BEGUN_WITH = (
    "begun with other weights, settings or versions, another number of processes, or other files beside the weights"
)


@dataclass
class Progress:
    """The progress of an unfinished conversion.

    Attributes:
        key: hash of everything that a resumed run must have in common with this run.
        facts: what ``key`` is the hash of (``export.state``); empty in folders of older versions.
        next_layer: the layer at which a resumed run continues.
        layers: the manifest's records of the finished layers.
        hashes: SHA-256 of the written shards in hex, by file name.
        checksum: CRC-32 of the saved hidden states.
        final_norm: factor on the weight of the last norm; None until all layers are written.
        texts: shares of the calibration texts by name; empty if the caller gave tokens.
        choice: the sizes of all layers (``convert.choose_budget``), if the recipe gives a loss instead of a size.
        measured_kl: KL to the source of the written layers, on text that chose nothing; None until all are written.
    """

    key: str
    facts: dict[str, Any] = field(default_factory=dict)
    next_layer: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    checksum: int = 0
    final_norm: float | None = None
    texts: dict[str, float] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)
    measured_kl: float | None = None


class Workspace:
    """The folder ``OUTPUT.partial`` of an unfinished conversion.

    The folder holds the written shards, the hidden states between two layers, and the progress. ``finish`` renames the
    folder to ``OUTPUT``. Nothing that another run wrote is changed, unless that run is resumed with the same ``key``.

    As a context manager, the workspace keeps other processes out of the folder from the moment that it exists.

    Args:
        output: folder of the finished export.
        shards: number of shards of the export.
    """

    def __init__(self, output: Path, shards: int) -> None:
        self.output, self.shards = output, shards
        self.folder = output.with_name(output.name + UNFINISHED_SUFFIX)
        self._held = False
        self._lock: int | None = None

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *exception: object) -> None:
        unlock_folder(self._lock)
        self._held, self._lock = False, None

    def refuse_overwrite(self, *, resume: bool) -> None:
        """Check that the run overwrites nothing, and that no other process writes. This check writes nothing.

        Raises:
            TransmlaError: if the output is not empty or a link, if there is an unfinished run and ``resume`` is off, or
                if ``OUTPUT.partial`` is no folder or belongs to another process.
        """
        refuse_taken(self.output)
        refuse_no_folder(self.folder)
        if not self.folder.exists():
            return
        self.hold()  # first: a folder in which another process writes must not be deleted
        if not resume:
            raise TransmlaError(
                f"an unfinished run is in '{self.folder}'",
                limit="nothing is ever overwritten",
                remedy="continue that run with --resume, or delete the folder",
            )

    def hold(self) -> None:
        """Create the folder if it is missing, and keep other processes out of it.

        Raises:
            TransmlaError: if another process writes into it, or has just finished the output.
        """
        if not self._held:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.folder)
            self._held = True
            if self.output.exists() and any(self.output.iterdir()):
                remove_if_empty(self.folder)
                self.refuse_overwrite(resume=True)

    def refuse_foreign(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Check that the folder, if it exists, holds an unfinished conversion. This check writes nothing.

        Args:
            facts: returns the facts of this run that are known before a weight is read.

        Raises:
            TransmlaError: as ``unfinished.refuse_foreign``. The files of a conversion with other ``facts`` are not
                foreign: the refusal names the facts.
        """
        try:
            refuse_foreign(self.folder, {self.shard_name(i) for i in range(self.shards)})
        except TransmlaError:
            saved, now = self.facts(), facts()
            before, after = ({name: run[name] for name in now if name in saved} for run in (saved, now))
            if key_of(before) != key_of(after):
                raise other_run(self.folder, _BEGUN_WITH, differences(before, after)) from None
            raise

    def open(self, facts: dict[str, Any], tell: Callable[[str], None]) -> Progress:
        """Create or reopen the folder, and return the progress so far.

        A shard that is damaged or missing is made again, and with it all shards: later layers build on it.

        Args:
            facts: everything that a resumed run must have in common with the run that it continues, by name.
            tell: receives a line for the user if shards are made again.

        Raises:
            TransmlaError: if the folder belongs to a run with other facts.
        """
        self.hold()
        file, key = self.folder / PROGRESS, key_of(facts)
        if not file.is_file():
            remove_temporaries(self.folder)
            progress = Progress(key, facts)
            self.save_progress(progress)
            return progress
        names = {item.name for item in fields(Progress)}
        progress = Progress(**read_state(file, key, names, begun_with=_BEGUN_WITH, facts=facts))
        remove_temporaries(self.folder)
        if damaged := first_damaged(self.folder, progress.hashes):
            tell(f"'{damaged}' is damaged or missing: starting again from the first layer")
            progress = Progress(key, facts, texts=progress.texts, choice=progress.choice)
            self.save_progress(progress)
        return progress

    def begun(self) -> bool:
        """Return whether the folder holds the progress of a run."""
        return (self.folder / PROGRESS).is_file()

    def facts(self) -> dict[str, Any]:
        """Return the facts of the run that the folder holds; empty if it holds none, or its progress is damaged."""
        facts = (read_json_object(self.folder / PROGRESS) or {}).get("facts")
        return facts if isinstance(facts, dict) else {}

    def size(self) -> int:
        """Return the bytes that an unfinished run has written."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def save_progress(self, progress: Progress) -> None:
        """Write the progress."""
        write_state(self.folder / PROGRESS, asdict(progress))

    def tokens(self) -> Tensor | None:
        """Return the calibration tokens [N, T] that an earlier run saved, or None.

        Raises:
            TransmlaError: if their file is damaged.
        """
        file = self.folder / CALIBRATION
        return self._load(file)["tokens"] if file.is_file() else None

    def save_tokens(self, tokens: Tensor) -> None:
        """Save the calibration tokens [N, T]."""
        write_tensors(self.folder / CALIBRATION, {"tokens": tokens})

    def save_streams(self, layer: int, streams: dict[str, Tensor]) -> int:
        """Save the tensors that ``layer`` starts from, and return their CRC-32."""
        # No sync: the files are large and soon deleted. The checksum detects a file that a crash damaged.
        write_tensors(self._streams(layer), streams, sync=False)
        return _checksum(streams)

    def streams(self, layer: int, checksum: int) -> dict[str, Tensor]:
        """Return the tensors that were saved for ``layer``.

        Raises:
            TransmlaError: if the file is missing or damaged, for example by a crash of the machine.
        """
        file = self._streams(layer)
        streams = self._load(file) if file.is_file() else {}
        if _checksum(streams) != checksum:
            raise TransmlaError(f"'{file}' is damaged", **self._without)
        return streams

    def _load(self, file: Path) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        with boundary(f"'{file}' is damaged", **self._without):
            return load_file(file)

    @property
    def _without(self) -> dict[str, str]:
        return {
            "limit": "a conversion cannot resume without this file",
            "remedy": f"delete '{self.folder}', and convert again",
        }

    def drop_streams(self, *, keep: int | None = None) -> None:
        """Delete the saved hidden states of all layers except layer ``keep``."""
        for file in self.folder.glob("stream-*"):
            if keep is None or file != self._streams(keep):
                file.unlink()

    def _streams(self, layer: int) -> Path:
        return self.folder / f"stream-{layer:05d}.safetensors"

    def shard_name(self, index: int) -> str:
        """Return the file name of shard ``index``, counted from 0."""
        return f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"

    def write_shard(self, index: int, tensors: dict[str, Tensor]) -> str:
        """Write shard ``index``, and return its SHA-256 in hex."""
        path = self.folder / self.shard_name(index)
        write_tensors(path, tensors)
        return file_sha256(path)

    def discard(self) -> None:
        """Delete the files of a run that has written no shard, and the folder if it is then empty."""
        remove_temporaries(self.folder)
        self._remove_state()
        remove_if_empty(self.folder)

    def finish(self) -> None:
        """Delete the files that only a resume needs, and rename the folder to the output."""
        self._remove_state()
        if self.output.exists():
            self.output.rmdir()
        self.folder.replace(self.output)

    def _remove_state(self) -> None:
        # The progress goes last: it tells a resumed run that the folder is a conversion's. Without it, a folder with a
        # complete export is one.
        for file in (*self.folder.glob("stream-*"), self.folder / CALIBRATION, self.folder / PROGRESS):
            file.unlink(missing_ok=True)


def _checksum(streams: dict[str, Tensor]) -> int:
    total = 0
    for name in sorted(streams):
        total = zlib.crc32(streams[name].contiguous().view(torch.uint8).numpy().data, total)
    return total
