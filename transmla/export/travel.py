"""The record of a conversion inside ``config.json``, which ``save_pretrained`` of transformers carries along.

Other software writes an export anew, for example after a fine-tuning: with other shards and without ``transmla.json``.
The record then still says how the model was made, and a hash of all tensors says whether they have changed.
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from transmla.boundary import boundary, read_json, read_json_object
from transmla.export.hashes import MANIFEST, PROGRESS, export_files, hash_files
from transmla.files import write_json
from transmla.guard.folder import READ, TEMPLATE_FOLDERS, check_folder

# Key of the record in config.json, and of the recipe's text inside the record.
KEY, RECIPE = "transmla", "recipe_text"
# Suffixes of the files that belong to a model that was saved again, besides those that a loader reads.
_MORE = (".safetensors", ".yaml", ".png")
# What trainers leave beside a model. It may hold paths of this machine.
_OF_TRAINERS = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")


def put_record(folder: Path, values: dict[str, Any], recipe: str) -> None:
    """Write the record of an export into its ``config.json``.

    Args:
        folder: folder of the export.
        values: the manifest as plain values; hashes of files are left out.
        recipe: the published recipe, as YAML.
    """
    record = {name: value for name, value in values.items() if name != "hashes"}
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, KEY: record | {RECIPE: recipe}})


def record_of(folder: Path) -> dict[str, Any] | None:
    """Return the record in the ``config.json`` of a folder; None if there is none."""
    record = (read_json_object(folder / "config.json") or {}).get(KEY)
    return record if isinstance(record, dict) else None


def is_resaved(folder: Path) -> bool:
    """Return whether a folder is an export that other software has saved again.

    Its ``config.json`` then holds the record, and it has no manifest. An unfinished conversion writes the record before
    the manifest, and is none.
    """
    written = [name for name in (MANIFEST, PROGRESS) if (folder / name).is_file()]
    return not written and record_of(folder) is not None


def manifest_of_resaved(folder: Path) -> dict[str, Any] | None:
    """Return the manifest, as plain values, of an export that other software has saved again.

    Its hashes are those of the files as they are now. None for any other folder.

    Raises:
        TransmlaError: if a file of the folder must not be read, or the weights cannot be.
    """
    record = record_of(folder) if is_resaved(folder) else None
    if record is None:
        return None
    check_folder(folder)
    changed = bool(record.get("weights_changed")) or record.get("weights") != weights_fingerprint(folder)
    values = {name: value for name, value in record.items() if name != RECIPE}
    return values | {"hashes": hash_resaved(folder), "resaved": True, "weights_changed": changed}


def hash_resaved(folder: Path) -> dict[str, str]:
    """Return the SHA-256 in hex of the files that make a model; not of what trainers leave beside it."""
    strangers = [name for name in export_files(folder) if not _belongs(PurePosixPath(name))]
    return hash_files(folder, {}, leave=strangers)


def _belongs(path: PurePosixPath) -> bool:
    placed = len(path.parts) == 1 or (len(path.parts) == 2 and path.parts[0] in TEMPLATE_FOLDERS)
    kind = path.suffix in (*READ, *_MORE) or path.name.lower().startswith(("licen", "notice"))
    return placed and kind and path.name not in _OF_TRAINERS


def weights_fingerprint(folder: Path) -> str:
    """Return a SHA-256 in hex over the name, dtype, shape and CRC-32 of every tensor, however they are sharded.

    Raises:
        TransmlaError: if a file cannot be read as safetensors.
    """
    import torch
    from safetensors import safe_open

    lines = []
    for file in sorted(folder.glob("model*.safetensors")):
        with (
            boundary(f"cannot read '{file}'", remedy="write the model again"),
            safe_open(file, framework="pt") as handle,
        ):
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                tensor = handle.get_tensor(name).contiguous()
                crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data) if tensor.numel() else 0
                lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {crc}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
