"""Functions, and `transmla convert`, on several CPU processes, with the variables that torchrun sets for them.

The processes are forked from the server of ``heal_on_two_processes``, which has imported torch and transformers.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from helpers.heal_on_two_processes import FORKS
from transmla.cli import app
from transmla.convert import memory, shard_writer
from transmla.core.fit_coordinates import Coordinates
from transmla.plan.fit_settings import FITS
from transmla.source import samples


def run(size: int, work: Callable[..., None], arguments: tuple[Any, ...], logs: Path) -> list[int | None]:
    """Call ``work(rank, *arguments)`` in ``size`` processes, and return their exit codes.

    Like torchrun, kill the others soon after one has failed. The processes write into ``logs``, a new folder.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs.mkdir()
    processes: list[BaseProcess] = []
    for rank in range(size):
        log = str(logs / f"{rank}.log")
        processes.append(FORKS.Process(target=_start, args=(rank, size, port, log, work, arguments)))
        processes[-1].start()
    for process in processes:
        process.join(120)
        if process.exitcode != 0:
            break
    for process in processes:
        process.join(5)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _start(rank: int, size: int, port: int, log: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with Path(log).open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(rank, *arguments)


def convert(rank: int, argv: list[str], changes: dict[str, Any]) -> None:
    """Run ``transmla convert``.

    ``changes``: settings of fits by name (``fits``); the folder that caches samples (``cache``); the layer after which
    the first process kills itself (``kill``); the bytes of memory that all processes may hold together (``free``); and
    the process in which the decomposition of a layer's moments fails (``undecomposed``).
    """
    for name, settings in changes.get("fits", {}).items():
        FITS[name] = replace(FITS[name], **settings)
    shard_writer.SAVE_SECONDS = 0
    samples._cache_file = lambda digest: Path(changes["cache"]) / digest if "cache" in changes else None
    if "free" in changes:
        memory.free_memory, memory.resident_memory = lambda: changes["free"], lambda: 0
    if rank == changes.get("undecomposed"):
        _fail_to_decompose()
    if "kill" in changes and rank == 0:
        _kill_after(changes["kill"])
    sys.argv = ["transmla", "convert", *argv]
    app.main()


def _fail_to_decompose() -> None:
    """Let every decomposition of the moments that a fit reads fail in this process."""
    made = Coordinates.of.__func__  # type: ignore[attr-defined]

    def failing(cls: type[Coordinates], *arguments: Any, empty: bool = False) -> Coordinates:
        if not empty:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return made(cls, *arguments, empty=empty)  # type: ignore[no-any-return]

    Coordinates.of = classmethod(failing)  # type: ignore[assignment, method-assign]


def _kill_after(layer: int) -> None:
    """Make this process kill itself once ``layer`` is written and the hidden states are saved."""
    write = shard_writer.ShardWriter.layer

    def dying(self: Any, index: int, converted: Any) -> None:
        write(self, index, converted)
        if index == layer:
            os.kill(os.getpid(), signal.SIGKILL)

    shard_writer.ShardWriter.layer = dying  # type: ignore[method-assign]
