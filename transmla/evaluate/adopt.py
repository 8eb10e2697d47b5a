"""Complete the folder of an export that other software has saved again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transmla.export.card import write_card
from transmla.export.hashes import CARD
from transmla.export.manifest import Manifest
from transmla.export.travel import RECIPE, hash_resaved, record_of
from transmla.files import write_text
from transmla.formats.base import format_named
from transmla.recipe import Recipe, read_recipe


def write_missing(folder: Path, manifest: Manifest) -> Recipe:
    """Write the code and the recipe of an export into ``folder`` if other software has left them out.

    Returns:
        The recipe.

    Raises:
        TransmlaError: if the recipe cannot be read.
    """
    if not (folder / "recipe.yaml").is_file():
        write_text(folder / "recipe.yaml", str((record_of(folder) or {}).get(RECIPE, "")))
    recipe = read_recipe(folder / "recipe.yaml", {"output": folder.name})
    format_named(manifest.format).write_code(folder)
    return recipe


def adopt(folder: Path, manifest: Manifest) -> Manifest:
    """Write everything that an export has and ``save_pretrained`` does not write, and return the new manifest.

    The manifest and the card say whether the weights have changed. A card that is there already stays.

    Args:
        folder: the export, saved again.
        manifest: what ``Manifest.read`` returned for it.

    Raises:
        OSError: if the folder cannot be written.
        TransmlaError: if the recipe cannot be read.
    """
    recipe = write_missing(folder, manifest)
    if not (folder / CARD).is_file():
        write_card(folder, manifest, recipe, format_named(manifest.format).card_words(manifest.plan.spec))
    manifest = replace(manifest, hashes=hash_resaved(folder))
    manifest.write(folder)
    return manifest
