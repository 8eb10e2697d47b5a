"""How long work tells a person where it stands; the command line draws it, a library call stays silent."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives the course of a conversion."""

    def stage(self, name: str, total: int) -> None:
        """A new stage begins, of ``total`` steps."""

    def advance(self, done: int, note: str = "") -> None:
        """``done`` steps of the stage are finished; ``note`` is what the last one found."""

    def message(self, text: str) -> None:
        """One line worth keeping on the screen."""


class Silent:
    """A reporter that reports nothing."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self, done: int, note: str = "") -> None: ...

    def message(self, text: str) -> None: ...
