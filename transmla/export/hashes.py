"""List and hash the files of an export, and write the index of its shards."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from transmla.boundary import leaves, read_json_object
from transmla.errors import TransmlaError
from transmla.files import write_json
from transmla.guard.named import MANIFEST, PROGRESS, UNFINISHED_SUFFIX, unfinished

__all__ = ["MANIFEST", "PROGRESS", "UNFINISHED_SUFFIX"]

CARD = "README.md"
VERIFICATION = "verification.json"
EVALUATION = "evaluation.json"
CALIBRATION = "calibration.safetensors"

# Files of an export that its manifest does not hash: they are written after it.
UNHASHED = (CARD, MANIFEST, VERIFICATION, EVALUATION)

TEMPORARY_SUFFIXES = (".tmp", ".incomplete", UNFINISHED_SUFFIX, "~")


def stays_behind(path: PurePosixPath) -> bool:
    """Return whether a file is not part of an export: a hidden file, a temporary file, or Python bytecode.

    Args:
        path: path of the file relative to the export's folder.
    """
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    return hidden or path.name.endswith(TEMPORARY_SUFFIXES)


def export_files(folder: Path) -> list[str]:
    """Return the files of an export: sorted paths relative to ``folder``, with forward slashes."""
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(file.as_posix() for file in files if not stays_behind(PurePosixPath(file.as_posix())))


def finished_hashes(folder: Path, *, unnamed: bool = False) -> dict[str, str]:
    """Return the hashes that the manifest of a finished export lists: SHA-256 in hex, by relative path.

    Args:
        folder: folder of the export.
        unnamed: whether the folder may still have the name of an unfinished run.

    Raises:
        TransmlaError: if the folder or the manifest is missing, if the manifest lists no hashes, or if the conversion
            is unfinished.
    """
    if not folder.exists():
        raise TransmlaError(
            f"'{folder}' does not exist",
            limit="an export is a folder that `transmla convert` wrote",
            remedy="check the path",
        )
    file = folder / MANIFEST
    manifest = read_json_object(file)
    if manifest is None or (not unnamed and folder.resolve().name.endswith(UNFINISHED_SUFFIX)):
        raise unfinished(folder)
    hashes = manifest.get("hashes")
    if not (hashes and isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values())):
        raise TransmlaError(
            f"{file} lists no file hashes",
            limit="the manifest of a finished export lists the hash of every file",
            remedy="run `transmla convert` again",
        )
    return hashes


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex. The file is read in chunks.

    Raises:
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export_fingerprint(hashes: Mapping[str, str]) -> str:
    """Return one SHA-256 in hex over all files of an export.

    Args:
        hashes: SHA-256 in hex by relative path, in any order.
    """
    digest = hashlib.sha256()
    for path in sorted(hashes):
        digest.update(f"{path}\0{hashes[path]}\n".encode())
    return digest.hexdigest()


def check_hashes(folder: Path, hashes: Mapping[str, str], *, free: Collection[str] = ()) -> list[str]:
    """Compare the files of an export with their hashes.

    A file is a problem if it is missing, has changed, has no hash, or lies outside the folder. Hashes that cover no
    config.json, or no safetensors file, are a problem too.

    Args:
        folder: folder of the export.
        hashes: expected SHA-256 in hex by relative path.
        free: relative paths of files that need no hash.

    Returns:
        A readable sentence for each problem; an empty list if there is none.

    Raises:
        OSError: if a file cannot be read.
    """
    present = export_files(folder)
    problems = [f"{path} is a link that leads out of the folder" for path in present if leaves(folder, folder / path)]
    if "config.json" not in hashes:
        problems.append("config.json has no hash")
    if not any(path.endswith(".safetensors") for path in hashes):
        problems.append("no safetensors file has a hash")
    for path, expected in sorted(hashes.items()):
        file = folder / path
        # The paths come from a manifest that anyone may have edited. They must not lead out of the folder.
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            problems.append(f"{path} is not a path inside the folder")
        elif not file.is_file():
            problems.append(f"{path} is missing")
        elif file_sha256(file) != expected:
            problems.append(f"{path} has changed since the conversion wrote it")
    # A loader may prefer an additional file to the checked ones, such as model.safetensors or an adapter.
    extra = [path for path in present if path not in hashes and path not in free]
    return problems + [f"{path} was not written by the conversion; remove it" for path in extra]


def write_index(folder: Path) -> None:
    """Write ``model.safetensors.index.json`` for the shards in ``folder``."""
    from safetensors import safe_open

    weight_map: dict[str, str] = {}
    total = 0
    for shard in sorted(folder.glob("model-*-of-*.safetensors")):
        with safe_open(shard, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                weight_map[name] = shard.name
                tensor = handle.get_slice(name)
                width = 4 if tensor.get_dtype() == "F32" else 2
                total += width * math.prod(tensor.get_shape())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def hash_files(folder: Path, known: dict[str, str], *, leave: Collection[str] = ()) -> dict[str, str]:
    """Return the SHA-256 in hex of every file in ``folder`` that an export lists in its manifest, by relative path.

    The files in ``UNHASHED`` and the files of an unfinished conversion are left out.

    Args:
        folder: folder of the export.
        known: hashes that are computed already.
        leave: relative paths of further files to leave out.
    """
    skipped = {*UNHASHED, PROGRESS, CALIBRATION, *leave}
    names = [name for name in export_files(folder) if name not in skipped and not name.startswith("stream-")]
    return {name: known.get(name) or file_sha256(folder / name) for name in names}
