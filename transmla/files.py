"""Write files atomically: after a crash, a file is either complete or absent."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from transmla.boundary import is_full_disk
from transmla.errors import TransmlaError


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Convert the error of a full disk into a ``TransmlaError`` that says how to continue.

    Args:
        folder: the folder that the block writes to.

    Raises:
        TransmlaError: if the disk is full. Other errors pass through.
    """
    from safetensors import SafetensorError

    try:
        yield
    # torch's zip writer raises RuntimeError.
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_full_disk(error):
            raise
        raise TransmlaError(
            f"the disk that holds '{folder}' is full",
            limit="what was written so far is kept",
            remedy="free some space, then run the same command with --resume",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8. Bytes of file names that are no UTF-8 are written as escapes."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], *, sync: bool = True) -> None:
    """Write a safetensors file atomically.

    Args:
        path: the file.
        tensors: tensors by name.
        sync: whether to wait until the data is on the disk. Without ``sync``, the file may be damaged after a crash of
            the machine, but not after a crash of the program.
    """
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    # safetensors makes files that only their owner can read. An ordinary new file has the mode that the umask leaves.
    temporary.touch()
    mode = stat.S_IMODE(temporary.stat().st_mode)
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"})
    temporary.chmod(mode)
    if sync:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    temporary.replace(path)
