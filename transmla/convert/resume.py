"""Decide whether a folder of an earlier run can be continued: everything that the two runs must have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import Plan
from transmla.boundary import local_path
from transmla.convert.prepare import Prepared
from transmla.errors import TransmlaError
from transmla.export.hashes import MANIFEST, PROGRESS, UNHASHED, check_hashes, file_sha256
from transmla.export.manifest import Manifest, versions
from transmla.export.state import differences, flags, key_of
from transmla.guard.folder import READ, TEMPLATE_FOLDERS
from transmla.recipe import Recipe
from transmla.shares import name_and_weight
from transmla.source.checkpoint import Checkpoint
from transmla.source.device import is_fast_in_bfloat16
from transmla.source.text import text_file

# Beginnings of the names, in lower case, of files for readers that an export copies or quotes.
_DOCUMENTS = ("licen", "notice", "copying", "use_policy", "readme")
# Files of an export that differ from the source's files of the same name.
_REWRITTEN = ("config.json", "tokenizer_config.json", "model.safetensors.index.json")
# Widths of an export by the flag that sets them.
_WIDTHS = {"--kv-lora-rank": "kv_lora_rank", "--qk-rope-head-dim": "qk_rope_head_dim", "--q-lora-rank": "q_lora_rank"}


def run_facts(
    prepared: Prepared, processes: int, fingerprint: str, tokens: Tensor, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return everything that must be equal when a conversion is resumed, by the name that a user reads.

    Files are compared by their contents, however their paths are written. The state lies in the output's folder, so
    the output does not count.

    Args:
        prepared: the conversion.
        processes: number of processes that share the work; they add up numbers in another order than one.
        fingerprint: hash of the source's tensors.
        tokens: calibration tokens [N, T].
        before: facts of the run that is resumed. A text that it has read may be missing now.
    """
    text_hash, before = hashlib.sha256(tokens.contiguous().numpy().data).hexdigest(), before or {}
    texts = {name: value or before.get(name) for name, value in _text_hashes(prepared.recipe).items()}
    follows = [prepared.plan.to_dict(), None if prepared.fit is None else asdict(prepared.fit)]
    return {
        **early_facts(prepared, processes),
        "the source's weights": fingerprint,
        **texts,
        "the calibration text": text_hash,
        "": key_of({"follows": [*follows, _named_source(prepared.recipe)]}),
    }


def early_facts(prepared: Prepared, processes: int) -> dict[str, Any]:
    """Return the facts that are known before weights and texts are read.

    Args:
        prepared: the conversion.
        processes: number of processes that share the work.
    """
    device, recipe = prepared.device, prepared.recipe
    files = {f"the source's {name}": value for name, value in companions(prepared.source.checkpoint).items()}
    source = _named_source(recipe) or str(local_path(recipe.source).resolve())
    return {
        "--source": source,
        **flags(_settings(recipe, "device", "heal")),
        **files,
        "the device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "fast bfloat16": is_fast_in_bfloat16(device),
        "the number of processes": processes,
        **{f"the version of {name}": value for name, value in versions().items()},
    }


def recipe_hash(recipe: Recipe) -> str:
    """Return a SHA-256 in hex over a recipe's settings. Of the path of a file, only the last name counts.

    The contents of texts do not count: a text may be gone when a run is resumed, which must end in the same bytes.
    """
    return key_of({"hub": _named_source(recipe), **flags(_settings(recipe))})


def _settings(recipe: Recipe, *free: str) -> dict[str, Any]:
    """Return the settings of a recipe that decide what a conversion writes, but for the source and those in ``free``.

    Texts that are files have their last names: their contents are compared.
    """
    values = recipe.model_dump(mode="json", exclude={"source", "output", "eval", *free})
    entries = []
    for entry in recipe.calibration.source:
        name, weight = name_and_weight(entry)
        file = text_file(name)
        entries.append(entry if file is None else file.name + ("" if weight is None else f":{weight}"))
    values["calibration"]["source"] = entries
    return values


def _text_hashes(recipe: Recipe) -> dict[str, str | None]:
    """Return the SHA-256 in hex of each calibration text that is a file; None if the file is missing."""
    files = [text_file(name_and_weight(entry)[0]) for entry in recipe.calibration.source]
    return {
        f"text {number} of --calibration": file_sha256(file) if file.is_file() else None
        for number, file in enumerate(files, start=1)
        if file is not None
    }


def _named_source(recipe: Recipe) -> str | None:
    """Return the source if it is a name: a Hub id, or a file inside a package; None if it is a path."""
    named = recipe.source.startswith("package:") or not local_path(recipe.source).exists()
    return recipe.source if named else None


def companions(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the SHA-256 in hex of each file beside a source's weights that an export may copy or follow.

    Those are its configs, tokenizer, templates and documents, by relative path. A GGUF source is one file.
    """
    folder = checkpoint.folder
    if checkpoint.gguf is not None:
        return {checkpoint.gguf: file_sha256(folder / checkpoint.gguf)}
    places = [folder, *(folder / name for name in TEMPLATE_FOLDERS if (folder / name).is_dir())]
    files = [file for place in places for file in place.iterdir() if file.is_file()]
    read = [file for file in files if file.suffix in READ or file.name.lower().startswith(_DOCUMENTS)]
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in sorted(read)}


def is_complete(folder: Path) -> bool:
    """Return whether an unfinished folder lacks nothing but its final name: its run was killed before the renaming."""
    return (folder / MANIFEST).is_file() and not (folder / PROGRESS).is_file()


def refuse_other_run(folder: Path, prepared: Prepared, fingerprint: str) -> None:
    """Check that a complete export is whole, and what the conversion ``prepared`` would write.

    Args:
        folder: the export, with its final name or without.
        prepared: the conversion.
        fingerprint: hash of the source's tensors.

    Raises:
        TransmlaError: if a file was changed, or the export has another recipe, source or software.
    """
    manifest = Manifest.read(folder, unnamed=True)
    same_run = (
        manifest.recipe == recipe_hash(prepared.recipe)
        and manifest.source.fingerprint == fingerprint
        and manifest.versions == versions()
    )
    theirs = companions(prepared.source.checkpoint)
    copied = sorted((set(theirs) & set(manifest.hashes)) - set(_REWRITTEN))
    if not same_run or any(theirs[name] != manifest.hashes[name] for name in copied):
        before = _recorded(manifest.plan, manifest.reconstruct, manifest.source.fingerprint, manifest.versions)
        after = _recorded(prepared.plan, prepared.recipe.reconstruct, fingerprint, versions())
        if prepared.recipe.accepted_kl is not None:  # the export's widths were chosen while it was converted
            after |= {flag: before[flag] for flag in _WIDTHS}
        before |= {f"the source's {name}": manifest.hashes[name] for name in copied}
        after |= {f"the source's {name}": theirs[name] for name in copied}
        raise TransmlaError(
            f"'{folder}' was converted with other settings, weights or versions",
            limit=differences(before, after) or "a resumed run must give the same result as an uninterrupted one",
            remedy="repeat the first run's command with --resume, or delete the folder",
        )
    if problems := check_hashes(folder, manifest.hashes, free=UNHASHED):
        raise TransmlaError(f"'{folder}' is damaged", limit=problems[0], remedy="delete the folder, and convert again")


def _recorded(plan: Plan, reconstruct: str, fingerprint: str, software: dict[str, str]) -> dict[str, Any]:
    """Return what an export records of the run that made it, by the name that a user reads."""
    return {
        **{flag: getattr(plan.shape, name) for flag, name in _WIDTHS.items()},
        **{f"--{name}": getattr(plan, name) for name in ("method", "format", "dtype")},
        "--reconstruct": reconstruct,
        "the source's weights": fingerprint,
        **{f"the version of {name}": value for name, value in software.items()},
    }
