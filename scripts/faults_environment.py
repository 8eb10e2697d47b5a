"""Count how commands end with files, names, streams, limits and disks that a user's machine may have.

    python scripts/faults_environment.py --json FILE

Every command runs in a forked process and must end well, or in one line that says what, limit and remedy. The cases of
other users' files and of disks need root.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fuzz_run
from faults_environment_cases import Case, cases
from helpers.forked import Ended, forked
from provenance import write_result

# Seconds after which a command is killed.
LONGEST = 60
# Exit codes beside that of a refusal: success, a failed check, and output that nobody reads.
GOOD = (0, 1, 128 + signal.SIGPIPE)


def passes(case: Case, ended: Ended) -> bool:
    """Return whether a command did its work, or refused in one line; without a traceback in both cases."""
    if any(words in ended.text for words in ("Traceback", "Exception ignored")):
        return False
    if ended.code == 2:
        return len(ended.errors) == 1 or case.silent
    return ended.code in GOOD


def run(case: Case, root: Path) -> Ended:
    """Run one case in a working folder of its own."""
    folder = Path(tempfile.mkdtemp(dir=root / "runs"))
    folder.chmod(0o777)

    def prepare() -> None:
        signal.alarm(LONGEST)
        os.chdir(folder)
        case.enter()

    try:
        case.arrange(folder)
        return forked(*case.arguments, prepare=prepare)
    finally:
        if (folder / "m").is_mount():
            subprocess.run(["umount", str(folder / "m")], check=True)
        subprocess.run(["chmod", "-R", "u+rwX", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def run_all(root: Path, chosen: Iterator[Case]) -> dict[str, dict[str, int]]:
    """Run cases, print those that fail, and return by kind how many were tried and how many passed."""
    found: dict[str, dict[str, int]] = {}
    for case in chosen:
        ended = run(case, root)
        row = found.setdefault(case.kind, {"tried": 0, "passed": 0})
        row["tried"] += 1
        if passes(case, ended):
            row["passed"] += 1
        else:
            print(f"{case.kind}, {case.name}: exit code {ended.code}\n{ended.text[-2000:]}", flush=True)
    return found


def open_to_all(root: Path) -> None:
    """Let all users read the sources and exports, and write into ``runs``."""
    root.chmod(0o755)
    (root / "runs").chmod(0o777)
    subprocess.run(["chmod", "-R", "a+rX", str(root)], check=True)


def main(arguments: list[str] | None = None) -> int:
    """Run all cases, and print a table of counts; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the counts with their provenance to this file")
    parser.add_argument("--commit", help="commit to record, for a copy without git history")
    given = parser.parse_args(arguments)
    with fuzz_run.bases() as root:
        open_to_all(root)
        found = run_all(root, cases(root))
    found["all"] = {key: sum(row[key] for row in found.values()) for key in ("tried", "passed")}
    print("| environment | tried | as they should |\n|---|---|---|")
    for kind, row in found.items():
        print(f"| {kind} | {row['tried']} | {row['passed']} |")
    if given.json:
        write_result(given.json, [{"environment": kind, **row} for kind, row in found.items()], given.commit)
    return int(found["all"]["passed"] < found["all"]["tried"])


if __name__ == "__main__":
    raise SystemExit(main())
