"""Write files atomically: after a crash, a file is either complete or absent."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transmla.boundary import is_full_disk
from transmla.errors import TransmlaError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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


# Beginning of the names of the folders that hold files while they are written. A hidden folder is no part of an export.
TEMPORARY = ".tmp-transmla-"


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Yield a path in a new folder beside ``path``. The file written there gets its name when the block ends.

    Libraries write temporary files of their own beside the file that they were asked for. If the process is killed,
    all of them stay in this folder, and ``remove_temporaries`` deletes them.
    """
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
    try:
        yield folder / path.name
        (folder / path.name).replace(path)
    finally:
        shutil.rmtree(folder)


def is_temporary(path: Path) -> bool:
    """Return whether a path is a folder of unfinished files, as its name and kind say."""
    return path.name.startswith(TEMPORARY) and path.is_dir() and not path.is_symlink()


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes were writing into ``folder``; earlier versions wrote it beside the other files."""
    for path in [*folder.iterdir()]:
        if is_temporary(path):
            shutil.rmtree(path)
        elif path.is_file() and (path.name.startswith(".tmp") or path.name.endswith(".tmp")):
            path.unlink()


def remove_folder(folder: Path, *, last: str) -> None:
    """Delete a folder of transmla. The file ``last`` goes at the end: until then it says what the folder is."""
    for path in [*folder.iterdir()]:
        if path.name != last:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / last).unlink(missing_ok=True)
    folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8. Bytes of file names that are no UTF-8 are written as escapes."""
    with temporary(path) as scratch, scratch.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON cannot hold.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_text(value: Any) -> str:
    """Return measurements as JSON; numbers that are NaN or infinite, which JSON cannot hold, become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors_in_turn(
    path: Path, described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], read: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file atomically, with one tensor in memory at a time.

    Args:
        path: the file.
        described: dtype and shape of each tensor, by name.
        read: returns the tensor with a given name; called once for each name, in their order.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in described.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS[str(dtype)], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    # The format aligns the tensors to eight bytes, by spaces after the header.
    encoded += b" " * (-len(encoded) % 8)
    with temporary(path) as scratch, scratch.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, (dtype, shape) in described.items():
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


# safetensors' names of the dtypes that ``write_tensors_in_turn`` writes.
_SAFETENSORS = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}


def write_tensors(path: Path, tensors: dict[str, Tensor], *, sync: bool = True) -> None:
    """Write a safetensors file atomically.

    Args:
        path: the file.
        tensors: tensors by name.
        sync: whether to wait until the data is on the disk. Without ``sync``, the file may be damaged after a crash of
            the machine, but not after a crash of the program.
    """
    from safetensors.torch import save_file

    with temporary(path) as scratch:
        # safetensors makes files that only their owner can read. A new file has the mode that the umask leaves.
        scratch.touch()
        mode = stat.S_IMODE(scratch.stat().st_mode)
        save_file({name: t.contiguous() for name, t in tensors.items()}, scratch, metadata={"format": "pt"})
        scratch.chmod(mode)
        if sync:
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
