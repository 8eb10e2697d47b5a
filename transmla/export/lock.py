"""Keep a second process out of a folder that a conversion or a healing writes."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path

from transmla.errors import TransmlaError

_log = logging.getLogger(__name__)

# What file systems answer that cannot lock a folder, such as NFS.
_CANNOT_LOCK = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock_folder(folder: Path) -> int | None:
    """Lock an existing folder for this process, and return what ``unlock_folder`` takes.

    The system holds the lock, on the folder itself: no file is written, a killed process loses the lock at once, and
    the lock follows the folder when it is renamed. Where folders cannot be locked, a warning says so.

    Raises:
        TransmlaError: if another process holds the lock, or has just renamed the folder.
    """
    if sys.platform == "win32":
        _log.warning("Windows cannot lock '%s': do not start a second run with this output", folder)
        return None
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise _taken(folder) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        renamed = not folder.exists() or not os.path.samestat(os.fstat(handle), folder.stat())
    except BlockingIOError as error:
        os.close(handle)
        raise _taken(folder) from error
    except OSError as error:
        os.close(handle)
        if error.errno not in _CANNOT_LOCK:
            raise
        _log.warning("the disk of '%s' cannot lock folders: do not start a second run with this output", folder)
        return None
    if renamed:
        os.close(handle)
        raise _taken(folder)
    return handle


def unlock_folder(handle: int | None) -> None:
    """Release the lock that ``lock_folder`` returned."""
    if handle is not None:
        os.close(handle)


def _taken(folder: Path) -> TransmlaError:
    return TransmlaError(
        f"another process is writing into '{folder}'",
        limit="two runs would spoil each other's files",
        remedy="wait for its end, or end it and continue with --resume",
    )
