"""Write a healed export: the student's files, with the changed tensors replaced."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from transmla import __version__
from transmla.errors import TransmlaError
from transmla.evaluate.adopt import write_missing
from transmla.evaluate.figures import write_curve
from transmla.evaluate.verify import verify
from transmla.export.card import public_healing, write_card
from transmla.export.hashes import hash_files
from transmla.export.manifest import Manifest
from transmla.export.travel import put_record, weights_fingerprint
from transmla.files import write_tensors, write_text
from transmla.formats.base import format_named
from transmla.formats.model_checks import Check
from transmla.heal.settings import Healing
from transmla.signature.sign import contents, sign
from transmla.source.checkpoint import open_checkpoint

CURVE = "healing.png"


def write_export(
    folder: Path, student: Path, changed: dict[str, Tensor], summary: dict[str, Any], settings: Healing, device: str
) -> None:
    """Write a healed export into the new ``folder``, and verify it.

    Args:
        folder: the folder to create.
        student: the export that was healed.
        changed: the changed tensors by name; all others are copied from ``student``.
        summary: the manifest's record of this healing, with its curve.
        settings: the options, written into ``healing.yaml``.
        device: the device that runs the verification.

    Raises:
        TransmlaError: if ``student`` lacks a changed tensor, or the new export fails ``transmla verify``.
    """
    folder.mkdir(parents=True)
    manifest = Manifest.read(student)
    if infinite := [name for name, tensor in changed.items() if not bool(tensor.isfinite().all())]:
        raise _failure(folder, Check("finite", False, f"'{infinite[0]}' has NaN or Inf"))
    _write_files(folder, student, manifest, changed)
    summary = {**summary, "settings": public_healing(summary["settings"])}
    dumped = public_healing(settings.model_dump(mode="json", exclude_none=True))
    write_text(folder / "healing.yaml", yaml.safe_dump(dumped, sort_keys=False))
    _draw_curve(folder / CURVE, summary)
    family, count = manifest.plan.spec.family, len(manifest.healing) + 1
    recipe = write_missing(folder, manifest).model_copy(update={"output": Path(settings.output).name})
    before = manifest.signature
    if before is not None and manifest.resaved:
        before = replace(before, **contents(folder))
    manifest = replace(
        manifest,
        healing=[*manifest.healing, summary],
        signature=sign(folder, family, device, before=before, healings=count),
        versions=manifest.versions | {"transmla": __version__},
        weights=weights_fingerprint(folder),
        resaved=False,
    )
    form = format_named(manifest.format)
    if form.carries_record:
        put_record(folder, manifest.to_dict(), (folder / "recipe.yaml").read_text(encoding="utf-8"))
    manifest = replace(manifest, hashes=hash_files(folder, {}))
    manifest.write(folder)
    write_card(folder, manifest, recipe, form.card_words(manifest.plan.spec))
    failed = [check for check in verify(folder, dtype=torch.float32, device=device) if not check.passed]
    if failed:
        raise _failure(folder, failed[0])


def _failure(folder: Path, check: Check) -> TransmlaError:
    return TransmlaError(
        f"the healed export does not pass '{check.name}'",
        limit=check.detail,
        remedy=f"inspect '{folder}', then start again with another --output and a lower --learning-rate",
    )


def _write_files(folder: Path, student: Path, manifest: Manifest, changed: dict[str, Tensor]) -> None:
    """Copy the student's files into ``folder``, and rewrite each shard that holds a changed tensor."""
    checkpoint, written = open_checkpoint(student), set()
    for name in sorted(set(manifest.hashes) - {CURVE}):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = _tensor_names(student / name) if name.endswith(".safetensors") else []
        if not set(tensors) & set(changed):
            shutil.copyfile(student / name, target)
            continue
        write_tensors(target, {n: changed.get(n, checkpoint.read(n)) for n in tensors})
        written |= set(tensors) & set(changed)
    if written != set(changed):
        raise TransmlaError(f"the student has no tensor '{min(set(changed) - written)}'", remedy="convert it again")


def _tensor_names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())


def _draw_curve(file: Path, summary: dict[str, Any]) -> None:
    """Draw the held-out curve if matplotlib is installed."""
    if find_spec("matplotlib"):
        write_curve(summary["curve"], file)
