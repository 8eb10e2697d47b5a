"""Save the state of an unfinished run with a digest of its values, and read it back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transmla.boundary import read_json_object
from transmla.errors import TransmlaError
from transmla.files import write_json

_DIGEST = "digest"


def write_state(file: Path, values: dict[str, Any]) -> None:
    """Write the state of a run, whose ``key`` says what a resumed run must have in common with this run."""
    write_json(file, values | {_DIGEST: _digest(values)})


def read_state(file: Path, key: str, names: Collection[str], *, begun_with: str) -> dict[str, Any]:
    """Return the values that ``write_state`` wrote.

    Args:
        file: the file of the state.
        key: the key of this run.
        names: the names that the values may have.
        begun_with: ends the sentence "the folder was …" if the run on disk is another one.

    Raises:
        TransmlaError: if the values have another ``key``, other names, or were changed since they were written.
    """
    values = read_json_object(file)
    digest = None if values is None else values.pop(_DIGEST, None)
    if values is not None and (values.get("key") != key or not set(values) <= set(names)):
        raise TransmlaError(
            f"'{file.parent}' was {begun_with}",
            limit="a resumed run must give the same result as an uninterrupted one",
            remedy="repeat the first run's command with --resume, or delete the folder",
        )
    if values is None or digest != _digest(values):
        raise TransmlaError(
            f"'{file}' is damaged",
            limit="its values differ from those that the run wrote",
            remedy=f"delete '{file.parent}', and start again",
        )
    return values


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
