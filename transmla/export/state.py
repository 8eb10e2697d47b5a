"""Save the state of an unfinished run with a digest of its values, and read it back.

The state's ``key`` is a hash of the run's *facts*: all values that a resumed run must have in common with the run that
it continues, by the name that a user reads. A value that follows from others has the name "". The state holds the facts
too, so that a refusal can name those that differ. Facts in ``SHOWN`` are no part of the key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transmla.boundary import read_json_object
from transmla.errors import TransmlaError
from transmla.files import write_json

# Facts that only a refusal shows: a source may lie in another folder, because hashes of its files are facts too.
SHOWN = frozenset({"--source"})
_DIGEST = "digest"
# Values that say nothing to a reader.
_HASH = re.compile(r"[0-9a-f]{64}")
# Most differences that a refusal names.
_MOST = 4


def write_state(file: Path, values: dict[str, Any]) -> None:
    """Write the state of a run, whose ``key`` says what a resumed run must have in common with this run."""
    write_json(file, values | {_DIGEST: _digest(values)})


def key_of(facts: Mapping[str, Any]) -> str:
    """Return the key of a run with these facts, which JSON can hold."""
    return _digest({name: value for name, value in facts.items() if name not in SHOWN})


def flags(values: Mapping[str, Any], prefix: str = "--") -> dict[str, Any]:
    """Return settings, nested as in a recipe, by their flags of the command line."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        # The flag of a section is that of its texts.
        flag = prefix.removesuffix("-") if name == "source" and prefix != "--" else prefix + name.replace("_", "-")
        found |= flags(value, f"{flag}-") if isinstance(value, Mapping) else {flag: value}
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return what differs between the facts of two runs, with old and new values; "" if nothing with a name does."""
    pairs = {name: (before.get(name), after.get(name)) for name in {**after, **before} if name}
    found = [_difference(name, *pair) for name, pair in pairs.items() if pair[0] != pair[1]]
    more = [f"{len(found) - _MOST} more changes"] if len(found) > _MOST else []
    return ", ".join(found[:_MOST] + more)


def _difference(name: str, before: Any, after: Any) -> str:
    if any(isinstance(value, dict) or _HASH.fullmatch(str(value)) for value in (before, after)):
        return f"{name} changed"
    return f"{name} was {_word(before)} and is {_word(after)}"


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "not given" if value is None else f"{value}"


def read_state(
    file: Path, key: str, names: Collection[str], *, begun_with: str, facts: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the values that ``write_state`` wrote.

    Args:
        file: the file of the state.
        key: the key of this run.
        names: the names that the values may have.
        begun_with: ends the sentence "the folder was …" if the run on disk is another one.
        facts: the facts of this run; without them, the refusal names no differences.

    Raises:
        TransmlaError: if the values have another ``key``, other names, or were changed since they were written.
    """
    values = read_json_object(file)
    digest = None if values is None else values.pop(_DIGEST, None)
    if values is not None and (values.get("key") != key or not set(values) <= set(names)):
        known = values.get("facts")
        changed = differences(known, facts) if known and facts and isinstance(known, dict) else ""
        limit = changed or "a resumed run must give the same result as an uninterrupted one"
        if "facts" not in values:
            raise TransmlaError(
                f"'{file.parent}' was {begun_with}",
                limit="an earlier version of transmla began it",
                remedy="resume it with that version, or delete the folder",
            )
        raise other_run(file.parent, begun_with, limit)
    if values is None or digest != _digest(values):
        raise TransmlaError(
            f"'{file}' is damaged",
            limit="its values differ from those that the run wrote",
            remedy=f"delete '{file.parent}', and start again",
        )
    return values


def other_run(folder: Path, begun_with: str, limit: str) -> TransmlaError:
    """Return the refusal of a folder that holds another run than the one that is resumed.

    Args:
        folder: the folder of the unfinished run.
        begun_with: ends the sentence "the folder was …".
        limit: what differs.
    """
    remedy = "repeat the first run's command with --resume, or delete the folder"
    return TransmlaError(f"'{folder}' was {begun_with}", limit=limit, remedy=remedy)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
