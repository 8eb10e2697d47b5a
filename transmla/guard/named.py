"""Decide what the name of a model means: a local path, or a model of the Hub. Nothing is read or downloaded."""

from __future__ import annotations

from pathlib import Path

from transmla.boundary import local_path
from transmla.errors import TransmlaError

# Manifest of a finished export, progress of an unfinished one, and the end of an unfinished one's name.
MANIFEST = "transmla.json"
PROGRESS = "progress.json"
UNFINISHED_SUFFIX = ".partial"
# Addresses that a browser shows for a model of the Hub.
HUB_ADDRESSES = ("https://huggingface.co/", "http://huggingface.co/", "https://hf.co/", "huggingface.co/")


def existing_path(name: str, kind: str, forms: str) -> Path | None:
    """Return the local path that ``name`` means, which exists; None if it is a Hub id.

    Args:
        name: a path, or a Hub id of the form org/name.
        kind: what the name stands for, for an error: ``source`` or ``model``.
        forms: the forms that a name may have, for an error.

    Raises:
        TransmlaError: if there is no such path, and the name is no Hub id.
    """
    path = local_path(name)
    if path.exists():
        return path
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise TransmlaError(f"{kind} '{name}' does not exist", limit=f"a {kind} is {forms}", remedy=_remedy(name))
    return None


def _remedy(name: str) -> str:
    """Return what to do about a name that means nothing. The address of a model holds the model's Hub id."""
    for address in HUB_ADDRESSES:
        parts = name.removeprefix(address).split("/")
        if name.startswith(address) and len(parts) > 1 and all(parts[:2]):
            return f"give the Hub id '{parts[0]}/{parts[1]}'"
    return "check the path"


def unfinished(folder: Path | str) -> TransmlaError:
    """Return the error for a folder without a finished conversion."""
    return TransmlaError(
        f"{folder} holds no finished conversion",
        limit=f"a finished export has a readable {MANIFEST}, and its name does not end in {UNFINISHED_SUFFIX}",
        remedy="run `transmla convert`, with --resume if it was interrupted",
    )


def refuse_unfinished(folder: Path) -> None:
    """Refuse the folder of an unfinished conversion or healing. A folder that transmla did not write passes.

    Raises:
        TransmlaError: if the folder is unfinished.
    """
    if folder.resolve().name.endswith(UNFINISHED_SUFFIX) or (folder / PROGRESS).is_file():
        raise unfinished(folder)
