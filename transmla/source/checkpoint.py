"""Open a source checkpoint, a Hugging Face folder or a GGUF file, and read its tensors on demand."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from transmla.errors import TransmlaError
from transmla.source.gguf import gguf_tensors, load_gguf

_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_DTYPES = ("F32", "F16", "BF16")


class Checkpoint:
    """The tensors of a checkpoint, by name. Shapes are known at once; values are read on demand.

    Args:
        folder: local folder with the config and the tokenizer.
        shapes: shape of every tensor, by name.
        read: returns the tensor with a given name, on the CPU.
        size: bytes of all tensors on disk.
        gguf: file name inside ``folder`` of a GGUF source; its tensors are all in memory. None for other sources.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        *,
        size: int,
        gguf: str | None = None,
    ) -> None:
        self.folder, self.read, self.size, self.gguf = folder, read, size, gguf
        # Old Llama checkpoints store their rotary frequencies, which follow from the config.
        self.shapes = {name: shape for name, shape in shapes.items() if not name.endswith("rotary_emb.inv_freq")}

    def layer(self, prefix: str) -> dict[str, Tensor]:
        """Read all tensors whose names begin with ``prefix``. The keys of the result leave the prefix out."""
        return {name.removeprefix(prefix): self.read(name) for name in self.shapes if name.startswith(prefix)}

    def fingerprint(self, progress: Callable[[int, int], None] | None = None) -> str:
        """Return a SHA-256 over every tensor's name, dtype, shape and CRC-32, and check that all values are finite.

        Args:
            progress: called after each tensor with the number of tensors done and the number of all tensors.

        Raises:
            TransmlaError: if a tensor holds NaN or Inf.
        """
        digest = hashlib.sha256()
        for done, name in enumerate(sorted(self.shapes), start=1):
            tensor = self.read(name).contiguous()
            low, high = torch.aminmax(tensor) if tensor.numel() else (torch.zeros(()), torch.zeros(()))
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise TransmlaError(
                    f"tensor '{name}' holds NaN or Inf",
                    limit="weights must be finite",
                    remedy="download the checkpoint again, or repair it",
                )
            crc = zlib.crc32(tensor.view(torch.uint8).numpy().data) if tensor.numel() else 0
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {crc}\n".encode())
            if progress:
                progress(done, len(self.shapes))
        return digest.hexdigest()


def open_checkpoint(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a checkpoint without reading its weights. A GGUF file is the exception: it is loaded into memory.

    Args:
        path: checkpoint folder or GGUF file.
        allow_pickle: whether pickled weights may be opened.

    Raises:
        TransmlaError: if there are no weights, if a file is missing, cut off or of another format, if a tensor has
            another dtype than float32, float16 or bfloat16, or if the weights are pickled and ``allow_pickle`` is off.
    """
    if path.is_file() and path.suffix == ".gguf":
        model = load_gguf(path)
        return _in_memory(path.parent, gguf_tensors(model), path.name)
    if not (path / "config.json").is_file():
        raise TransmlaError(
            f"no config.json in '{path}'",
            limit="a checkpoint folder holds config.json and safetensors files",
            remedy="check SOURCE",
        )
    if (path / _INDEX).is_file():
        shards = sorted(set(_weight_map(path / _INDEX).values()))
    elif (path / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    else:
        return _open_pickle(path, allow_pickle)
    return _open_safetensors(path, shards)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise TransmlaError(
            f"'{index}' is not a valid shard index", limit=str(error), remedy="download it again"
        ) from error


def _open_safetensors(folder: Path, shards: list[str]) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        file = folder / shard
        if not file.is_file():
            raise TransmlaError(
                f"shard '{shard}' is missing from '{folder}'",
                limit=f"the index names {len(shards)} shards",
                remedy="download it again",
            )
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise TransmlaError(
                f"shard '{shard}' is corrupt or cut off", limit=str(error), remedy="download it again"
            ) from error
        for name in handle.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
            view = handle.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise TransmlaError(
                    f"tensor '{name}' is stored as {view.get_dtype()}",
                    limit="weights must be float32, float16 or bfloat16",
                    remedy="convert the unquantised checkpoint",
                )
            files[name] = file
            shapes[name] = tuple(view.get_shape())

    def read(name: str) -> Tensor:
        # Open the file for each tensor: a mapped file keeps its pages in memory until its last tensor is freed.
        with safe_open(files[name], framework="pt") as handle:
            return handle.get_tensor(name)

    size = sum((folder / shard).stat().st_size for shard in shards)
    return Checkpoint(folder, shapes, read, size=size)


def _open_pickle(folder: Path, allow: bool) -> Checkpoint:
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if not pickles:
        raise TransmlaError(
            f"no weights in '{folder}'",
            limit=f"expected model.safetensors or {_INDEX}",
            remedy="check SOURCE",
        )
    if not allow:
        raise TransmlaError(
            f"'{folder}' holds pickled weights ({pickles[0]})",
            limit="a pickle can run code when it is opened",
            remedy="convert the weights to safetensors, or pass --allow-pickle if you trust them",
        )
    index = folder / _PICKLES[1]
    files = sorted(set(_weight_map(index).values())) if index.is_file() else [_PICKLES[0]]
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            # torch.load cannot map files from before torch 1.6, which are not zip archives.
            mapped = zipfile.is_zipfile(folder / file)
            tensors |= torch.load(folder / file, map_location="cpu", weights_only=True, mmap=mapped)
        except (OSError, RuntimeError, pickle.UnpicklingError, TypeError, EOFError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise TransmlaError(
                f"'{file}' cannot be opened as pickled weights",
                limit=f"{type(error).__name__}: {reason}",
                remedy="download it again",
            ) from error
    return _in_memory(folder, tensors)


def _in_memory(folder: Path, tensors: Mapping[str, Tensor], gguf: str | None = None) -> Checkpoint:
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return Checkpoint(folder, shapes, tensors.__getitem__, size=size, gguf=gguf)
