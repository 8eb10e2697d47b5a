"""Standard output and error of the command line: nothing that a terminal, a pipe or a locale does ends a command.

Output that a closed pipe cannot take is dropped: a conversion of hours does not end because its reader left. Characters
that an encoding lacks are written as escapes.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO


class Tolerant(io.TextIOBase):
    """Standard error as text: what cannot be written is dropped. It looks ``sys.stderr`` up at every call."""

    def write(self, text: str) -> int:
        """Write ``text``, as far as the stream takes it."""
        stream = _stderr()
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        stream = _stderr()
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()

    def isatty(self) -> bool:
        """Return whether standard error is a terminal."""
        stream = _stderr()
        return stream is not None and not stream.closed and stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor of standard error."""
        stream = _stderr()
        if stream is None:
            raise OSError("standard error is closed")
        return stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of standard error."""
        return getattr(_stderr(), "encoding", None) or "utf-8"


def _stderr() -> TextIO | None:
    """Return standard error itself.

    While a progress bar is drawn on a terminal, ``sys.stderr`` is rich's proxy, which prints on the console that
    ``Tolerant`` writes for. Writing to the proxy would never end.
    """
    return getattr(sys.stderr, "rich_proxied_file", sys.stderr)


def prepare_streams() -> None:
    """Open closed streams, and let standard output and error escape what their encoding lacks."""
    if sys.stdout is None:
        sys.stdout = _nowhere()
    if sys.stderr is None:
        sys.stderr = _nowhere()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def flush_output() -> None:
    """Write what standard output still holds.

    Raises:
        OSError: if the stream does not take it, for example because its disk is full.
    """
    if not sys.stdout.closed:
        sys.stdout.flush()


def abandon_output() -> None:
    """Send what is left of standard output nowhere, so that Python does not report it when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
