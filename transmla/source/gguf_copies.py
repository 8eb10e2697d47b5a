"""Copies of GGUF files in the cache: what each was made of, who uses it, and which can never be used again.

A process locks the folder of a copy while it makes or uses it. A killed process loses its locks at once.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from transmla.files import remove_folder, write_json

# File of a copy that says what it was made of. Without a suffix, because files with one belong to the checkpoint.
ORIGIN = "origin"
# Locks of this process, by device and inode of the folder.
_locks: dict[tuple[int, int], int] = {}


def origin_of(path: Path) -> dict[str, Any]:
    """Return path, size and time of change of a file, by which its copy is found again."""
    stat = path.stat()
    return {"path": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def begin_copy(folder: Path, path: Path) -> None:
    """Lock the new ``folder``, and record that it becomes the copy of the file ``path``."""
    use_copy(folder)
    write_json(folder / ORIGIN, origin_of(path))


def use_copy(folder: Path) -> None:
    """Keep other processes from removing a copy, until this process ends. Some disks and systems have no locks.

    If another process is removing the copy, wait until it is gone.
    """
    handle = _lock(folder, exclusive=False)
    if handle is None:
        return
    stat = os.fstat(handle)
    if _locks.setdefault((stat.st_dev, stat.st_ino), handle) != handle:
        os.close(handle)


def remove_dead_copies(parent: Path) -> None:
    """Remove the copies in ``parent`` whose file is gone or has changed, and those that a killed process began.

    Copies that a process uses stay, and so do folders that say nothing of their file.
    """
    folders: list[Path] = []
    with suppress(OSError):  # a cache that other users share may hide what it holds
        folders = sorted(parent.iterdir())
    for folder in folders:
        handle = _lock(folder, exclusive=True) if _is_dead(folder) else None
        if handle is not None:
            with suppress(OSError):
                # A copy without a config is unfinished, also if this process is killed meanwhile.
                (folder / "config.json").unlink(missing_ok=True)
                remove_folder(folder, last=ORIGIN)
            os.close(handle)


def copy_bytes(folder: Path) -> int:
    """Return the size of a copy in bytes."""
    return sum(file.stat().st_size for file in folder.iterdir())


def _is_dead(folder: Path) -> bool:
    """Return whether ``folder`` is a copy that is unfinished, or whose file is gone or has changed."""
    try:
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        path = Path(origin["path"])
    except (OSError, ValueError, TypeError, KeyError):
        return False
    try:
        changed = origin_of(path) != origin
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):  # the file cannot be seen now
        return False
    return changed or not (folder / "config.json").is_file()


def _lock(folder: Path, *, exclusive: bool) -> int | None:
    """Lock a folder and return the handle of the lock; None if folders have no locks, or if another process holds one.

    A lock that is not ``exclusive`` is shared with all others like it. It waits for an exclusive lock to end.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
    except OSError:
        os.close(handle)
        return None
    return handle
