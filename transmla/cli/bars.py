"""Progress of long work on standard error: bars on a terminal, elsewhere and on a dumb terminal a line a minute."""

from __future__ import annotations

import math
import time

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from transmla.cli.console import duration, err, note, plain_line
from transmla.errors import printable

# Width of the note on a progress bar, in characters.
NOTE_WIDTH = 20
# Seconds between two lines off a terminal. The bars of all stages are printed there once, at the end.
EVERY = 60.0


def draws() -> bool:
    """Return whether standard error is a terminal that can redraw a bar."""
    return err.is_terminal and not err.is_dumb_terminal


class Bars:
    """A ``Reporter`` that draws one progress bar per stage."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            # On a narrow screen only the bar shrinks.
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left"),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, max_width=NOTE_WIDTH)),
            console=err,
            # One step can take minutes. The estimate rests on all steps, where rich takes those of thirty seconds.
            speed_estimate_period=math.inf,
        )
        self.task: TaskID | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # Off a terminal the bars are printed once, here. After a failure the error's line should stand alone.
        self.progress.live.transient = kind is not None and not draws()
        self.progress.live.stop()
        if not err.is_terminal and not self.progress.live.transient and self.progress.tasks:
            err.line()  # rich ends the last bar with a new line on terminals only

    def stage(self, name: str, total: int) -> None:
        """Start a new bar of ``total`` steps."""
        self.task = self.progress.add_task(printable(name), total=total, note="")

    def advance(self, done: int, note: str | int = "") -> None:
        """Move the bar to ``done`` steps; show ``note`` behind it."""
        if self.task is None:
            return
        self.progress.update(self.task, completed=done, note=note if isinstance(note, str) else "")
        if not draws() and time.monotonic() - self._printed >= EVERY:
            self._printed = time.monotonic()
            plain_line(self._line())

    def spent(self, phase: str, seconds: float) -> None:
        """Show nothing: the table of times comes at the end."""

    def message(self, text: str) -> None:
        """Print one line above the bars."""
        note(text)

    def _line(self) -> str:
        """The state of the newest bar in words."""
        task = self.progress.tasks[-1]
        line = f"{task.description} {task.completed:.0f}/{task.total:.0f}, {duration(task.elapsed or 0.0)}"
        left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
        behind = f": {task.fields['note']}" if task.fields["note"] else ""
        return line + left + behind
