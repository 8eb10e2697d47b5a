"""The files of an export: their names, which of them belong to it, their hashes, and one fingerprint over them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from transmla.errors import TransmlaError
from transmla.export.files import write_json

PROGRESS = "progress.json"
MANIFEST = "transmla.json"
CARD = "README.md"
VERIFICATION = "verification.json"
CALIBRATION = "calibration.safetensors"

UNFINISHED_SUFFIX = ".partial"
TEMPORARY_SUFFIXES = (".tmp", ".incomplete", UNFINISHED_SUFFIX, "~")


def stays_behind(path: PurePosixPath) -> bool:
    """Whether ``path``, relative to an export, is no part of it: hidden, temporary, or Python's bytecode."""
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    return hidden or path.name.endswith(TEMPORARY_SUFFIXES)


def export_files(folder: Path) -> list[str]:
    """The files that make up an export: sorted paths relative to ``folder``, with forward slashes."""
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(file.as_posix() for file in files if not stays_behind(PurePosixPath(file.as_posix())))


def read_json(file: Path) -> dict[str, Any] | None:
    """The JSON object in ``file``; None when there is none that can be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def finished_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 in hex of every file that a finished conversion or healing wrote into ``folder``, by relative path.

    Raises:
        TransmlaError: if the manifest is missing or lists no hashes, or if the conversion is unfinished.
    """
    file = folder / MANIFEST
    manifest = read_json(file)
    if folder.resolve().name.endswith(UNFINISHED_SUFFIX) or manifest is None:
        raise TransmlaError(
            f"{folder} holds no finished conversion",
            limit=f"a finished one has a readable {MANIFEST} and no {UNFINISHED_SUFFIX} in its name",
            remedy="run `transmla convert`, with --resume if it was interrupted",
        )
    hashes = manifest.get("hashes")
    if not (hashes and isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values())):
        raise TransmlaError(
            f"{file} lists no file hashes",
            limit="a conversion lists there every file that it writes",
            remedy="run `transmla convert` again",
        )
    return hashes


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


def check_hashes(folder: Path, hashes: Mapping[str, str], *, free: Collection[str] = ()) -> list[str]:
    """Compare the files under `folder` with `hashes` (relative path -> sha256 in hex).

    Returns one readable problem per file that is missing, differs, lies outside the folder, or is there
    without a hash and not `free` of one; an empty list when all agree. Without config.json and a safetensors
    file `hashes` covers no model, which is a problem too. Raises OSError when a file cannot be read.
    """
    problems = []
    if "config.json" not in hashes:
        problems.append("config.json has no hash")
    if not any(path.endswith(".safetensors") for path in hashes):
        problems.append("no safetensors file has a hash")
    for path, expected in sorted(hashes.items()):
        file = folder / path
        # The list comes from a file that anyone may have edited: it must not lead out of the folder.
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            problems.append(f"{path} is not a path inside the folder")
        elif not file.is_file():
            problems.append(f"{path} is missing")
        elif file_sha256(file) != expected:
            problems.append(f"{path} has changed since the conversion wrote it")
    # A loader may prefer such a file to those that were checked: model.safetensors to the shards, an adapter.
    extra = [path for path in export_files(folder) if path not in hashes and path not in free]
    return problems + [f"{path} was not written by the conversion; remove it" for path in extra]


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


def hash_files(folder: Path, known: dict[str, str]) -> dict[str, str]:
    """SHA-256 of every file a reader relies on: all but the card and the manifest itself."""
    skipped = {MANIFEST, CARD, PROGRESS, CALIBRATION, VERIFICATION}
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in skipped)
    names = [p.relative_to(folder).as_posix() for p in files if not p.name.startswith("stream-")]
    return {name: known.get(name) or file_sha256(folder / name) for name in names}
