"""Progress reports of long-running work.

The command line passes a reporter that draws progress bars. Library calls use ``Silent`` unless the caller passes
a reporter.
"""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """An object that receives the progress of a conversion, a benchmark or a healing run."""

    def stage(self, name: str, total: int) -> None:
        """Start a new stage with ``total`` steps."""

    def advance(self, done: int, note: str = "") -> None:
        """Record that ``done`` steps of the stage are finished; ``note`` is the result of the last step."""

    def message(self, text: str) -> None:
        """Show one line of text that stays on the screen."""


class Silent:
    """A reporter that discards everything."""

    def stage(self, name: str, total: int) -> None:
        """Discard the start of a stage."""

    def advance(self, done: int, note: str = "") -> None:
        """Discard a progress update."""

    def message(self, text: str) -> None:
        """Discard a line of text."""
