"""Names, shapes and dtypes of the tensors in safetensors files, read from the files' headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transmla.boundary import boundary
from transmla.errors import TransmlaError
from transmla.guard.folder import INDEX, WEIGHTS, weight_map


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file.

    Attributes:
        file: the file that holds the tensor.
        shape: shape of the tensor.
        dtype: dtype in safetensors' words, such as ``BF16``.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def shards_of(folder: Path) -> list[str]:
    """Return the names of a folder's safetensors files: the single file, or those of the index; empty without either.

    transformers has the same order, so a single file beside an index is the model.

    Raises:
        TransmlaError: if there is no single file, and the index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    return sorted(set(weight_map(folder / INDEX).values())) if (folder / INDEX).is_file() else []


def read_headers(folder: Path, shards: list[str]) -> dict[str, Stored]:
    """Return every tensor of some safetensors files by name.

    Raises:
        TransmlaError: if a file is missing, corrupt or cut off.
    """
    from safetensors import safe_open

    tensors: dict[str, Stored] = {}
    for shard in shards:
        file = folder / shard
        with boundary(f"cannot read shard '{shard}'", remedy="check the file"):
            missing = not file.is_file()
        if missing:
            raise TransmlaError(
                f"shard '{shard}' is missing from '{folder}'",
                limit=f"the index names {len(shards)} shards",
                remedy="download it again",
            )
        with boundary(f"shard '{shard}' is corrupt or cut off", remedy="download it again"):
            handle = safe_open(file, framework="pt")
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                view = handle.get_slice(name)
                tensors[name] = Stored(file, tuple(view.get_shape()), str(view.get_dtype()))
    return tensors
