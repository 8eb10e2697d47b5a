"""Run the command line in a forked process: as another user, with limits, or with streams that fail."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transmla import cli

NOBODY = 65534


@dataclass(frozen=True)
class Ended:
    """How a forked command ended.

    Attributes:
        code: exit code; negative for a signal.
        text: what the command printed on both streams.
    """

    code: int
    text: str

    @property
    def errors(self) -> list[str]:
        """The lines that begin with ``error: ``."""
        return [line for line in self.text.splitlines() if line.startswith("error: ")]


def forked(*argv: str, prepare: Callable[[], object] = lambda: None, stdin: bytes = b"") -> Ended:
    """Run ``transmla ARGV`` in a forked process.

    Args:
        argv: the arguments.
        prepare: called in the new process before the command, for example to become another user.
        stdin: what the command reads from standard input.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        child = os.fork()
        if child == 0:
            _run([*argv], prepare, given.fileno(), output.fileno())
        _, status = os.waitpid(child, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), text)


def _run(argv: list[str], prepare: Callable[[], object], given: int, output: int) -> None:
    code = 70
    try:
        for old, new in ((given, 0), (output, 1), (output, 2)):
            os.dup2(old, new)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        prepare()
        sys.argv = ["transmla", *argv]
        cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        os.dup2(output, 2)
        traceback.print_exc(file=os.fdopen(2, "w", closefd=False))
    finally:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            code = code or 99
        os._exit(code)


def become_nobody() -> None:
    """Give up the rights of root, so that permissions count."""
    if os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def refused(ended: Ended, says: str) -> bool:
    """Return whether a command ended with one line that holds ``says``, and exit code 2."""
    clean = "Traceback" not in ended.text and "\x1b" not in ended.text
    return ended.code == 2 and clean and len(ended.errors) == 1 and says in ended.errors[0]


def folder_for_all(folder: Path) -> None:
    """Let every user read and enter ``folder`` and the folders of pytest above it, if the tests run as root."""
    for place in (folder, *folder.parents):
        if os.getuid() == 0 and (place == folder or "pytest" in place.name or place.name.startswith("popen-gw")):
            place.chmod(place.stat().st_mode | 0o755)
