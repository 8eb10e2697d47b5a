"""Kill conversions and healings at any moment, resume them, and compare every byte with an unbroken run.

    python scripts/faults_kills.py --kills 500 --json FILE

A run is killed before a file event, inside the write of a file, or at a random moment, always by a signal that no
program can catch. A third of the runs are killed again while they resume. Inside a write, the system itself ends the
process: a limit on the size of files is set just before the write, and its signal, SIGXFSZ, keeps its default effect.
Every run is a forked process on a tiny random model, so that libraries are imported once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from faults_kill_jobs import Job, jobs, prepare, shorten
from tqdm import tqdm

from transmla.errors import TransmlaError

KINDS = ("before an event", "inside a write", "at a random moment")
# Audit events of Python that change files.
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
# Bytes after which the write of a file is ended.
LIMITS = (0, 1, 17, 300, 4000, 30000)
# Seconds after which a run counts as hung.
PATIENCE = 180


@dataclass(frozen=True)
class Kill:
    """How a run is killed.

    Attributes:
        kind: one of ``KINDS``.
        event: index of the file event before which, or after which, it happens.
        limit: largest size of a file from then on, in bytes.
        seconds: moment, for ``at a random moment``.
    """

    kind: str
    event: int = 0
    limit: int = 0
    seconds: float = 0.0


# Progress bars share a lock between processes, and a killed process never gives it back. Here each process has its own.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


def forked(folder: Path, work: Callable[[], object]) -> int:
    """Start ``work`` in a forked process whose working folder is ``folder``, and return its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        shorten()
        work()
        code = 0
    except TransmlaError as error:
        os.write(2, f"error: {error}\n".encode())
        code = 2
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def ended(child: int, kill_after: float | None = None) -> int:
    """Wait for a process, and return its exit code, negative for a signal. It may be killed after some seconds."""
    began = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - began
        if passed > PATIENCE or (kill_after is not None and passed > kill_after):
            os.kill(child, signal.SIGKILL)
            kill_after = None
        time.sleep(0.002)


def on_events(act: Callable[[int], None]) -> None:
    """Call ``act`` with the index of each file event of this process in folders that begin with ``out``."""
    count = 0

    def hook(event: str, arguments: Any) -> None:
        nonlocal count
        if event == "open":
            change = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            change = event in CHANGES
        if change and any(_in_output(argument) for argument in arguments[:2]):
            act(count)
            count += 1

    sys.addaudithook(hook)


def _in_output(path: Any) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    text = os.fsdecode(path)
    return text.startswith("out") or f"{os.getcwd()}/out" in text


def killed(job: Job, kill: Kill, resume: bool) -> None:
    """Run a job in this process, which ``kill`` ends."""

    def act(index: int) -> None:
        if index == kill.event and kill.kind == KINDS[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == kill.event and kill.kind == KINDS[1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (kill.limit, kill.limit))

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    on_events(act)
    job.work(resume)


def unbroken(job: Job, folder: Path) -> None:
    """Run a job to its end, and note its events, duration and files."""

    def counted() -> None:
        on_events(lambda index: os.pwrite(counter, f"{index + 1:08d}".encode(), 0))
        job.work(False)

    counter = os.open(folder / "events", os.O_RDWR | os.O_CREAT)
    began = time.monotonic()
    code = ended(forked(folder, counted))
    if code:
        raise RuntimeError(f"{job.name} fails unbroken: {(folder / 'log.txt').read_text()[-2000:]}")
    job.seconds, job.events = time.monotonic() - began, int(os.pread(counter, 8, 0))
    os.close(counter)
    job.bytes = tree(folder / "out")


def tree(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file under ``folder``, by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def draw(job: Job, drawn: random.Random) -> Kill:
    """Draw a way to kill a job."""
    kind = drawn.choice(KINDS)
    limit = drawn.choice(LIMITS)
    return Kill(kind, drawn.randrange(job.events), limit, drawn.uniform(0, 1.1 * job.seconds))


def attempt(job: Job, base: Path, drawn: random.Random) -> tuple[list[str], int, str]:
    """Kill a run once or twice, resume it, and compare its bytes.

    Returns:
        The kinds of the kills, how many kills took effect, and what is wrong; empty if all bytes are equal.
    """
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder, kinds, deaths = Path(name), list[str](), 0
        for part in ("source", "text.txt", "student-native", "student-transmla"):
            (folder / part).symlink_to(base / part)
        for turn in range(2 if drawn.random() < 1 / 3 else 1):
            kill = draw(job, drawn)
            kinds.append(kill.kind)
            after = kill.seconds if kill.kind == KINDS[2] else None
            code = ended(forked(folder, lambda kill=kill, turn=turn: killed(job, kill, turn > 0)), after)
            deaths += code < 0
            if code > 0 and not _finished(folder):
                return kinds, deaths, f"{kill}: ended with {code}: {_last_line(folder)}"
        code = ended(forked(folder, lambda: job.work(True)))
        # A run that had given the export its name has nothing to continue.
        if code and not (code == 2 and _finished(folder)):
            return kinds, deaths, f"{kill}: --resume ended with {code}: {_last_line(folder)}"
        found = tree(folder / "out") if (folder / "out").is_dir() else {}
        differing = [name for name in found.keys() | job.bytes.keys() if found.get(name) != job.bytes.get(name)]
        left = [path.name for path in folder.glob("out*") if path.name != "out"]
        wrong = f"{kill}: files differ: {sorted(differing)[:4]}" if differing else ""
        return kinds, deaths, wrong or (f"{kill}: left {left}" if left else "")


def _finished(folder: Path) -> bool:
    return "is not empty" in _last_line(folder) and (folder / "out").is_dir()


def _last_line(folder: Path) -> str:
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def run(
    limit: int, seed: int = 0, report: Callable[[str], object] = lambda _: None, only: str = ""
) -> list[dict[str, Any]]:
    """Kill ``limit`` runs, spread over the jobs and kinds of kills.

    Args:
        limit: number of runs.
        seed: seed of everything that is drawn.
        report: receives a line for each fault, and for each job.
        only: beginning of the names of the jobs.

    Returns:
        One row a job: its name, how many runs were killed and resumed, how many kills took effect by kind, how many
        runs were killed again while they resumed, and how many ended in the same bytes.
    """
    drawn, rows, place = random.Random(seed), [], Path.cwd()
    base = Path(tempfile.mkdtemp(prefix="kills-base-"))
    try:
        chosen = [job for job in jobs() if job.name.startswith(only)][:limit]
        prepare(base, heals=any(job.name.startswith("heal") for job in chosen))
        for position, job in enumerate(chosen):
            (base / "unbroken").mkdir()
            for part in ("source", "text.txt", "student-native", "student-transmla"):
                (base / "unbroken" / part).symlink_to(base / part)
            unbroken(job, base / "unbroken")
            shutil.rmtree(base / "unbroken")
            row: dict[str, Any] = {"job": job.name, "runs": 0, "killed": 0, "again": 0, "equal": 0, "faults": []}
            counts: Counter[str] = Counter()
            for _ in range(limit // len(chosen) + (position < limit % len(chosen))):
                kinds, deaths, wrong = attempt(job, base, drawn)
                counts.update(kinds[:1])
                row["runs"] += 1
                row["killed"] += deaths > 0
                row["again"] += len(kinds) > 1
                row["equal"] += not wrong
                if wrong:
                    row["faults"].append(wrong)
                    report(f"{job.name}: {wrong}")
            rows.append(row | {"kinds": {kind: counts[kind] for kind in KINDS}})
            report(f"{job.name}: {row['equal']} of {row['runs']} in the same bytes, {row['killed']} killed")
    finally:
        gc.unfreeze()
        os.chdir(place)
        shutil.rmtree(base)
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="number of runs that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the rows into")
    arguments = parser.parse_args()
    rows = run(arguments.kills, arguments.seed, lambda line: print(line, flush=True))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"{sum(row['equal'] for row in rows)} of {sum(row['runs'] for row in rows)} runs end in the same bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
