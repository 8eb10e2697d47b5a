"""From healed weights to an export: the student's files, with what changed in its place."""

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
from transmla.evaluate.figures import write_curve
from transmla.evaluate.verify import verify
from transmla.export.card import write_card
from transmla.export.files import write_tensors, write_text
from transmla.export.hashes import hash_files
from transmla.export.manifest import Manifest
from transmla.formats.base import format_named
from transmla.heal.settings import Healing
from transmla.recipe import read_recipe
from transmla.source.checkpoint import open_checkpoint

CURVE = "healing.png"


def write_export(
    folder: Path, student: Path, changed: dict[str, Tensor], summary: dict[str, Any], settings: Healing, device: str
) -> None:
    """Write an export into the new ``folder``: ``student`` with the tensors ``changed``, and check it.

    Raises:
        TransmlaError: if what was written does not pass ``transmla verify``.
    """
    folder.mkdir(parents=True)
    manifest = Manifest.read(student)
    checkpoint, written = open_checkpoint(student), set()
    for name in sorted(set(manifest.hashes) - {CURVE}):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = _shard(student / name) if name.endswith(".safetensors") else []
        if not set(tensors) & set(changed):
            shutil.copyfile(student / name, target)
            continue
        write_tensors(target, {n: changed.get(n, checkpoint.read(n)) for n in tensors})
        written |= set(tensors) & set(changed)
    if written != set(changed):
        raise TransmlaError(f"the student has no tensor '{min(set(changed) - written)}'", remedy="convert it again")
    dumped = settings.model_dump(mode="json", exclude_none=True)
    write_text(folder / "healing.yaml", yaml.safe_dump(dumped, sort_keys=False))
    _draw(folder / CURVE, summary)
    manifest = replace(
        manifest,
        healing=[*manifest.healing, summary],
        versions=manifest.versions | {"transmla": __version__},
        hashes=hash_files(folder, {}),
    )
    manifest.write(folder)
    recipe = read_recipe(folder / "recipe.yaml", {"output": Path(settings.output).name})
    write_card(folder, manifest, recipe, format_named(manifest.format).card_words(manifest.plan.spec))
    failed = [check for check in verify(folder, dtype=torch.float32, device=device) if not check.passed]
    if failed:
        raise TransmlaError(
            f"the healed export does not pass '{failed[0].name}'",
            limit=failed[0].detail,
            remedy=f"look at '{folder}', and begin again in another --output, with a lower --learning-rate",
        )


def _shard(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())


def _draw(file: Path, summary: dict[str, Any]) -> None:
    """The curve, where matplotlib is installed."""
    if find_spec("matplotlib"):
        write_curve(summary["curve"], file)
