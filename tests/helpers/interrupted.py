"""Interrupt a conversion after a chosen layer, and read the files that it left."""

from __future__ import annotations

from pathlib import Path

from transmla.reporter import Silent


class Killed(BaseException):
    """Stands in for a signal. A ``BaseException``, so that no ``except Exception`` in the package catches it."""


class KilledAtLayer(Silent):
    """A reporter that raises ``Killed`` after ``layer`` layers are finished."""

    def __init__(self, layer: int) -> None:
        self.layer, self.converting = layer, False

    def stage(self, name: str, total: int) -> None:
        self.converting = name == "converting layers"

    def advance(self, done: int, note: str = "") -> None:
        if self.converting and done == self.layer:
            raise Killed


def files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file under ``folder``, by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
