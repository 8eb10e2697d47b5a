"""What ties a verification to the files it read: their hashes, and one fingerprint over all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath


def file_sha256(path: Path) -> str:
    """The file's sha256 in hex, read as a stream.

    Raises OSError when the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export_fingerprint(hashes: Mapping[str, str]) -> str:
    """One sha256, in hex, over an export's files: relative path -> sha256, in any order."""
    digest = hashlib.sha256()
    for path in sorted(hashes):
        digest.update(f"{path}\0{hashes[path]}\n".encode())
    return digest.hexdigest()


def check_hashes(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """Compare the files under `folder` with `hashes` (relative path -> sha256 in hex).

    Returns one readable problem per file that is missing, differs, or lies outside the folder; an empty
    list when all agree. Raises OSError when a file that is there cannot be read.
    """
    problems = []
    for path, expected in sorted(hashes.items()):
        file = folder / path
        # The list comes from a file that anyone may have edited: it must not lead out of the folder.
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            problems.append(f"{path} is not a path inside the folder")
        elif not file.is_file():
            problems.append(f"{path} is missing")
        elif file_sha256(file) != expected:
            problems.append(f"{path} has changed since the conversion wrote it")
    return problems
