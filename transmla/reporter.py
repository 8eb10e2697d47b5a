"""Progress reports of long-running work.

The command line passes a reporter that draws progress bars. Library calls use ``Silent`` unless the caller passes
a reporter.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


class Reporter(Protocol):
    """An object that receives the progress of a conversion, a benchmark or a healing run."""

    def stage(self, name: str, total: int) -> None:
        """Start a new stage with ``total`` steps."""

    def advance(self, done: int, note: str = "") -> None:
        """Record that ``done`` steps of the stage are finished; ``note`` is the result of the last step."""

    def spent(self, phase: str, seconds: float) -> None:
        """Record that the stage spent ``seconds`` on one phase of its work."""

    def message(self, text: str) -> None:
        """Show one line of text that stays on the screen."""


class Silent:
    """A reporter that discards everything."""

    def stage(self, name: str, total: int) -> None:
        """Discard the start of a stage."""

    def advance(self, done: int, note: str = "") -> None:
        """Discard a progress update."""

    def spent(self, phase: str, seconds: float) -> None:
        """Discard the time of a phase."""

    def message(self, text: str) -> None:
        """Discard a line of text."""


@dataclass
class StageTime:
    """The time of one stage.

    Attributes:
        name: name of the stage.
        seconds: its time, until the next stage began.
        phases: seconds of the phases that the stage tells of, by name.
    """

    name: str
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)


class Timed:
    """A reporter that measures the time of every stage, and hands all reports on.

    Attributes:
        stages: the stages in order; what comes before the first is called "starting".
    """

    def __init__(self, report: Reporter) -> None:
        """Begin to measure; reports go on to ``report``."""
        self._report, self._began = report, time.monotonic()
        self.stages = [StageTime("starting")]

    def stage(self, name: str, total: int) -> None:
        """End the stage before, and start a new one."""
        self._end()
        self.stages.append(StageTime(name))
        self._report.stage(name, total)

    def advance(self, done: int, note: str = "") -> None:
        """Hand on a progress update."""
        self._report.advance(done, note)

    def spent(self, phase: str, seconds: float) -> None:
        """Record the time of a phase."""
        self.stages[-1].phases[phase] = seconds
        self._report.spent(phase, seconds)

    def message(self, text: str) -> None:
        """Hand on a line of text."""
        self._report.message(text)

    def finish(self) -> list[dict[str, Any]]:
        """End the last stage, and return the stages as plain values for JSON."""
        self._end()
        return [asdict(stage) for stage in self.stages]

    def _end(self) -> None:
        now = time.monotonic()
        self.stages[-1].seconds += now - self._began
        self._began = now
