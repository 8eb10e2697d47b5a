"""The boundary of the package: errors of the system and of libraries become a ``TransmlaError`` here, and only here.

``boundary`` wraps one call of a library that reads what a user gave: whatever the library raises is a fault of that
input. ``explain`` translates what any code may meet: the errors of the operating system, of memory and of encodings.
Every other error is a bug of transmla, and passes through.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transmla.errors import TransmlaError

# The first bytes of the file that git-lfs leaves in the place of a large one, and the size that it never exceeds.
LFS_POINTER, LFS_SIZE = b"version https://git-lfs", 1024
# Bytes of the largest JSON or YAML file that is parsed. The largest tokenizers have 40 MB.
LARGEST_TEXT = 2**28
# Characters of a library's message that are shown.
LONGEST_REASON = 300
FULL = (errno.ENOSPC, errno.EDQUOT)

# errno → (what is wrong with the path, limit, remedy).
_SYSTEM: dict[int, tuple[str, str, str]] = {
    errno.EACCES: ("no permission for", "this user may not read, write or enter it", "change its permissions"),
    errno.EPERM: ("no permission for", "the system does not allow this", "change its permissions or its owner"),
    errno.EROFS: ("cannot write", "its disk is read-only", "choose a path on another disk"),
    errno.ENOENT: ("there is no", "a part of this path does not exist", "check the path"),
    errno.ENOTDIR: ("there is no", "a part of this path is not a folder", "check the path"),
    errno.EISDIR: ("cannot use", "it is a folder", "give a file"),
    errno.EEXIST: ("cannot create", "it exists", "choose another path"),
    errno.ELOOP: ("cannot follow", "its links lead in a circle", "check the links"),
    errno.ENAMETOOLONG: ("cannot use", "the file system allows no name of this length", "choose a shorter name"),
    errno.ENOSPC: ("cannot write", "the disk is full", "free some space"),
    errno.EDQUOT: ("cannot write", "this user's share of the disk is full", "free some space"),
    errno.EFBIG: ("cannot write", "a file may not be that large here", "raise the limit (`ulimit -f`)"),
    errno.EMFILE: ("cannot open", "this process has too many open files", "raise the limit (`ulimit -n`)"),
    errno.ENFILE: ("cannot open", "this machine has too many open files", "close some programs"),
    errno.EIO: ("cannot read or write", "the disk reports an error", "check the disk"),
    errno.ENOMEM: ("cannot open", "there is not enough memory", "close other programs"),
    errno.ESTALE: ("cannot read or write", "the network disk has lost it", "mount the disk again"),
}  # fmt: skip


@contextmanager
def boundary(what: str, *, remedy: str, limit: str = "") -> Iterator[None]:
    """Convert any error inside the block into a ``TransmlaError``. The block calls one library on a user's input.

    Args:
        what: what is wrong if the block fails, such as "cannot read the config of 'x'".
        remedy: what the user can do.
        limit: replaces the library's own words.

    Raises:
        TransmlaError: for every error. An error of the system, such as a lack of permission, keeps its own words.
    """
    try:
        yield
    except TransmlaError:
        raise
    except BaseException as error:
        # Libraries written in Rust raise their panics as a class that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        system = _system_cause(error)
        raise system or TransmlaError(what, limit=limit or reason(error), remedy=remedy) from error


def explain(error: BaseException) -> TransmlaError | None:
    """Return the ``TransmlaError`` that explains an error of the system; None if the error is a bug."""
    if isinstance(error, TransmlaError):
        return error
    if isinstance(error, UnicodeError):
        return TransmlaError(
            "a text or a file name cannot be encoded",
            limit=reason(error),
            remedy="set the locale to one with UTF-8, such as LC_ALL=C.UTF-8",
        )
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return TransmlaError(
            "there is not enough memory",
            limit=reason(error),
            remedy="close other programs, choose another --device, or work on smaller sequences or batches",
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("transmla"):
        return TransmlaError(
            "a package that transmla needs cannot be imported", limit=reason(error), remedy="install it again"
        )
    return _of_system(error)


def reason(error: BaseException) -> str:
    """Return the type of an error and the beginning of its text, in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_full_disk(error: BaseException) -> bool:
    """Return whether an error of Python, safetensors or torch says that the disk is full."""
    # torch's zip writer reports a failed write only by the position that it reached.
    full = re.search(r"No space left|PytorchStreamWriter failed|unexpected pos \d+ vs \d+", str(error))
    return getattr(error, "errno", None) in FULL or full is not None


def _system_cause(error: BaseException) -> TransmlaError | None:
    """Return the explanation of the system's error that ``error`` or one of its causes is; None if there is none."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        # A missing file is explained better by the caller, who knows what the file is for.
        number = getattr(current, "errno", None)
        if isinstance(current, OSError) and number in _SYSTEM and number not in (errno.ENOENT, errno.ENOTDIR):
            return _of_system(current)
        current = current.__cause__ or current.__context__
    return None


def _of_system(error: BaseException) -> TransmlaError | None:
    """Return the explanation of an error of the operating system, which safetensors and torch quote in a text."""
    if isinstance(error, OSError):
        number, name = error.errno, error.filename
    else:
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        number, name = (int(quoted[1]) if quoted else errno.ENOSPC if is_full_disk(error) else None), None
        if number is None:
            return None
    path = f"'{os.fsdecode(name)}'" if isinstance(name, str | bytes | os.PathLike) else "a file"
    if number == errno.ENOENT and name is None and not _has_working_folder():
        return TransmlaError(
            "the working folder does not exist", limit="it was deleted", remedy="change into another folder"
        )
    if number in _SYSTEM:
        what, limit, remedy = _SYSTEM[number]
        return TransmlaError(f"{what} {path}", limit=limit, remedy=f"{remedy}, then run the same command again")
    return TransmlaError(f"the system reports an error for {path}", limit=reason(error), remedy="check path and disk")


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _is_out_of_memory(error: BaseException) -> bool:
    # torch raises RuntimeError on the CPU and OutOfMemoryError on a GPU.
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "CUDA out of memory" in text)
    )


def local_path(text: str | Path) -> Path:
    """Return a path that a user typed, with ``~`` replaced by the home folder.

    Raises:
        TransmlaError: if the path names an unknown user, holds a NUL, or is too long for the system.
    """
    path = Path(text)
    with boundary(f"'{text}' is not a path", remedy="check the path"):
        path = path.expanduser()
        if "\0" in str(path):
            raise ValueError("a path cannot hold a NUL character")
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # raises for a name that is too long, or below a folder that this user may not enter
    return path


def read_text(path: Path, kind: str = "") -> str:
    """Return the text of a regular file in UTF-8. ``kind`` names the file in the error, such as "recipe".

    Raises:
        TransmlaError: if the file is missing, no regular file, too large, a pointer of git-lfs, or not UTF-8.
    """
    with boundary(f"cannot read {kind} '{path}'", remedy="check the file"):
        check_regular(path)
        if path.stat().st_size > LARGEST_TEXT:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, and at most {LARGEST_TEXT:,} are read")
        return path.read_text(encoding="utf-8-sig")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        TransmlaError: as ``read_text``; also if the file holds no JSON, or is nested too deeply.
    """
    text = read_text(path)
    with boundary(f"'{path}' is not a valid JSON file", remedy="download it again, or correct it"):
        return json.loads(text)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if the file is missing or damaged, or holds no object.

    Raises:
        TransmlaError: if the system refuses to read the file.
    """
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except TransmlaError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return None
    return value if isinstance(value, dict) else None


def check_regular(path: Path) -> None:
    """Check that a path that exists is a file with content of its own: no pipe, no device, no pointer of git-lfs.

    Raises:
        OSError: if the path does not exist or may not be read.
        TransmlaError: if it is no such file.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise TransmlaError(
            f"'{path}' is not a file", limit="a pipe, a device or a folder is not read", remedy="give a file"
        )
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    if state.st_size <= LFS_SIZE:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise TransmlaError(
                    f"'{path}' is a pointer of git-lfs, not the file itself",
                    limit="git-lfs did not download the file",
                    remedy="run `git lfs pull` in that folder",
                )


def leaves(folder: Path, file: Path) -> bool:
    """Return whether ``file``, a path below ``folder``, leads out of the folder by a link.

    The Hub's cache is an exception: a model's folder ``snapshots/COMMIT``, or a folder inside, links into ``blobs``.
    """
    root, target = folder.resolve(), file.resolve()
    # ``blobs`` lies beside ``snapshots``, and may itself be a link to another disk.
    blobs = [(place.parent / "blobs").resolve() for place in root.parents if place.name == "snapshots"]
    return not any(target.is_relative_to(place) for place in (root, *blobs))
