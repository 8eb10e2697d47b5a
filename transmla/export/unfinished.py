"""Look into a folder ``OUTPUT.partial`` that an earlier run left, without changing it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from transmla.boundary import read_json_object
from transmla.errors import TransmlaError
from transmla.export.hashes import CALIBRATION, MANIFEST, PROGRESS, file_sha256, stays_behind
from transmla.files import is_temporary

_STREAM = re.compile(r"stream-\d{5}\.safetensors")


def refuse_no_folder(folder: Path) -> None:
    """Check that the path of an unfinished run is free, or a folder of its own.

    Raises:
        TransmlaError: if the path is a link or a file.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise TransmlaError(
            f"'{folder}' is a {'link' if folder.is_symlink() else 'file'}",
            limit="an unfinished run is written into a folder of this name",
            remedy="move it away, or choose another --output",
        )


def refuse_foreign(folder: Path, shards: Collection[str]) -> None:
    """Check that a folder, if it exists, holds an unfinished conversion and nothing else.

    Args:
        folder: the folder of the unfinished run.
        shards: names of the conversion's shards.

    Raises:
        TransmlaError: if the folder has files but no progress, or holds a link or a file of something else.
    """
    if not folder.exists():
        return
    paths = [path for path in sorted(folder.iterdir()) if not is_temporary(path)]
    names = {path.name for path in paths}
    if paths and not names & {PROGRESS, MANIFEST}:
        raise foreign(folder, "conversion")
    # The files beside the shards are written after the last layer. Their names depend on the source.
    complete = MANIFEST in names or (read_json_object(folder / PROGRESS) or {}).get("final_norm") is not None
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    strange = [path for path in paths if not complete and not _is_early(path.name, shards)]
    if links or strange:
        raise TransmlaError(
            f"'{(links or strange)[0]}' was not written by this conversion",
            limit="everything in this folder becomes the export",
            remedy="move it out of the folder",
        )


def _is_early(name: str, shards: Collection[str]) -> bool:
    """Return whether a file of this name may stand in the folder before the last layer is written."""
    known = name in {PROGRESS, CALIBRATION, *shards}
    return known or _STREAM.fullmatch(name) is not None or stays_behind(PurePosixPath(name))


def foreign(folder: Path, kind: str) -> TransmlaError:
    """Return the error for a folder of unfinished runs that holds something else than a ``kind``."""
    return TransmlaError(
        f"'{folder}' holds no {kind} to continue",
        limit="something else has written into it, and nothing is ever overwritten",
        remedy="choose another --output, or move the folder away",
    )


def first_damaged(folder: Path, hashes: Mapping[str, str]) -> str | None:
    """Return the first file that is missing or has another SHA-256 than ``hashes`` lists; None if all are right."""
    for name, expected in sorted(hashes.items()):
        if not (folder / name).is_file() or file_sha256(folder / name) != expected:
            return name
    return None


def remove_if_empty(folder: Path) -> None:
    """Delete a folder if nothing is in it."""
    if not any(folder.iterdir()):
        folder.rmdir()
