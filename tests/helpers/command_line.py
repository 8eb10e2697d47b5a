"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

# ``run("plan", "source", …)`` → (exit code, stdout, stderr).
Run = Callable[..., tuple[int, str, str]]
CALIBRATION = ["--calibration", "text.txt", "--calibration-sequences", "4", "--calibration-length", "32"]


def refuses(run: Run, *argv: str, says: str, output: str = "out") -> None:
    """Exit code 2, one line that holds ``says``, nothing on standard output, nothing on disk."""
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert "Traceback" not in err
    assert not list(Path().glob(f"{output}*"))
