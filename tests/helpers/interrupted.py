"""A conversion that dies at a chosen layer, and what it left."""

from __future__ import annotations

from pathlib import Path

from transmla.reporter import Silent


class Killed(BaseException):
    """Stands for a signal: no handler in the package may catch it."""


class KilledAtLayer(Silent):
    """Dies after ``layer`` layers are finished."""

    def __init__(self, layer: int) -> None:
        self.layer, self.converting = layer, False

    def stage(self, name: str, total: int) -> None:
        self.converting = name == "converting layers"

    def advance(self, done: int, note: str = "") -> None:
        if self.converting and done == self.layer:
            raise Killed


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file under ``folder``, by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
