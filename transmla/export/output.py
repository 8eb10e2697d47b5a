"""Check the folder that a conversion or a healing is to write, before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

from transmla.boundary import boundary, local_path
from transmla.errors import TransmlaError
from transmla.export.hashes import UNFINISHED_SUFFIX

# The longest name that a command gives to a folder or file beside OUTPUT or inside it.
_LONGEST_SUFFIX = len(".unhealed.partial")
LONGEST_NAME = 255


def output_path(name: str) -> Path:
    """Return the folder that a conversion or a healing writes, after checking that it can be created.

    Raises:
        TransmlaError: if the path has no name, its name is too long or belongs to unfinished runs, or if its parent is
            no folder that this user may write to.
    """
    if not name:  # such as "$UNSET" in a shell; Path("") would be the current folder
        raise TransmlaError("the output is an empty name", limit="an export is a new folder", remedy="give --output")
    output = local_path(name)
    if not output.name:  # "." has no name to append ".partial" to
        with boundary(f"cannot write to '{name}'", remedy="choose another --output"):
            output = output.resolve()
    if not output.name or output.name == "..":
        raise TransmlaError(
            f"'{name}' has no name", limit="an export is a new folder", remedy="choose another --output"
        )
    with boundary(
        f"the path '{output}' is not UTF-8", remedy="choose another --output", limit="safetensors writes no other"
    ):
        str(output).encode()
    if output.name.endswith(UNFINISHED_SUFFIX):
        raise TransmlaError(
            f"the name of '{output}' ends in {UNFINISHED_SUFFIX}",
            limit="folders of unfinished runs are called so",
            remedy="choose another --output",
        )
    if len(os.fsencode(output.name)) + _LONGEST_SUFFIX > LONGEST_NAME:
        raise TransmlaError(
            f"the name '{output.name[:40]}…' is too long",
            limit=f"at most {LONGEST_NAME - _LONGEST_SUFFIX} bytes",
            remedy="choose a shorter --output",
        )
    check_writable(output)
    return output


def check_writable(output: Path) -> Path:
    """Return the deepest existing folder above ``output``, after checking that this user may write to it.

    Raises:
        TransmlaError: if that is no folder, or is not writable.
    """
    with boundary(f"cannot write to '{output}'", remedy="choose another --output"):
        parent = output.absolute().parent
        while not parent.exists():
            parent = parent.parent
        usable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    if not usable:
        raise TransmlaError(
            f"cannot write to '{parent}'",
            limit="this path is not a folder, or this user may not write to it",
            remedy="choose another --output",
        )
    return parent


def refuse_taken(output: Path) -> None:
    """Check that a run that writes ``output`` overwrites nothing.

    Raises:
        TransmlaError: if the output is a link, a file, or a folder that is not empty.
    """
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise TransmlaError(
            f"output '{output}' is not empty" if output.is_dir() else f"output '{output}' exists",
            limit="nothing is ever overwritten",
            remedy="choose another --output, or delete this one",
        )
