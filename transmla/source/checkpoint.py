"""Open a source checkpoint, a Hugging Face folder or a GGUF file, and read its tensors on demand."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from transmla.boundary import boundary
from transmla.errors import TransmlaError
from transmla.guard.folder import INDEX, PICKLES, WEIGHTS, check_pickles, weight_map
from transmla.guard.headers import read_headers, shards_of
from transmla.source.gguf import gguf_tensors, load_gguf

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
    shards = shards_of(path)
    return _open_safetensors(path, shards) if shards else _open_pickle(path, allow_pickle)


def _open_safetensors(folder: Path, shards: list[str]) -> Checkpoint:
    from safetensors import safe_open

    stored = read_headers(folder, shards)
    for name, tensor in stored.items():
        if tensor.dtype not in _DTYPES:
            raise TransmlaError(
                f"tensor '{name}' is stored as {tensor.dtype}",
                limit="weights must be float32, float16 or bfloat16",
                remedy="convert the unquantised checkpoint",
            )

    def read(name: str) -> Tensor:
        # Open the file for each tensor: a mapped file keeps its pages in memory until its last tensor is freed.
        with safe_open(stored[name].file, framework="pt") as handle:
            return handle.get_tensor(name)

    size = sum((folder / shard).stat().st_size for shard in shards)
    return Checkpoint(folder, {name: tensor.shape for name, tensor in stored.items()}, read, size=size)


def _open_pickle(folder: Path, allow: bool) -> Checkpoint:
    if not check_pickles(folder, allow=allow):
        raise TransmlaError(
            f"no weights in '{folder}'",
            limit=f"expected {WEIGHTS} or {INDEX}",
            remedy="check SOURCE",
        )
    single, index = PICKLES
    # transformers' order: a single file beside an index is the model.
    files = [single] if (folder / single).is_file() else sorted(set(weight_map(folder / index).values()))
    tensors: dict[str, Tensor] = {}
    for file in files:
        with boundary(f"'{file}' cannot be opened as pickled weights", remedy="download it again"):
            # torch.load cannot map files from before torch 1.6, which are not zip archives.
            mapped = zipfile.is_zipfile(folder / file)
            opened = torch.load(folder / file, map_location="cpu", weights_only=True, mmap=mapped)
            if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in opened.items()):
                raise TypeError("it holds other things than tensors by name")
            tensors |= opened
    return _in_memory(folder, tensors)


def _in_memory(folder: Path, tensors: Mapping[str, Tensor], gguf: str | None = None) -> Checkpoint:
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return Checkpoint(folder, shapes, tensors.__getitem__, size=size, gguf=gguf)
