"""Open a source checkpoint, a Hugging Face folder or a GGUF file, and read its tensors on demand."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from transmla.boundary import boundary
from transmla.errors import TransmlaError
from transmla.guard.folder import INDEX, PICKLES, WEIGHTS, check_pickles, weight_map
from transmla.guard.headers import Stored, read_headers, shards_of
from transmla.source.gguf_weights import DTYPE, GgufWeights
from transmla.source.packed_weights import packed_weights, quantisation, stored_dtype

# safetensors' names of the dtypes that weights may have.
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """The tensors of a checkpoint, by name. Shapes are known at once; values are read on demand.

    Args:
        folder: local folder with the config and the tokenizer.
        shapes: shape of every tensor, by name.
        read: returns the tensor with a given name, on the CPU.
        dtypes: dtype of every tensor, by name.
        size: bytes of all tensors as they are read.
        gguf: file name inside ``folder`` of a GGUF source that is not unpacked. None for other sources.
        headers_only: whether ``read`` raises, because the weights are not on this machine.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        *,
        dtypes: Mapping[str, torch.dtype],
        size: int,
        gguf: str | None = None,
        headers_only: bool = False,
    ) -> None:
        self.folder, self.read, self.dtypes, self.size, self.gguf = folder, read, dtypes, size, gguf
        self.headers_only = headers_only
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
            check_finite(name, tensor)
            crc = zlib.crc32(tensor.view(torch.uint8).numpy().data) if tensor.numel() else 0
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {crc}\n".encode())
            if progress:
                progress(done, len(self.shapes))
        return digest.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite. Unlike ``isfinite``, this takes no memory in proportion to the tensor."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def check_finite(name: str, tensor: Tensor) -> None:
    """Check that all values of a checkpoint's tensor are finite.

    Raises:
        TransmlaError: if one is NaN or infinite.
    """
    if not is_finite(tensor):
        raise TransmlaError(
            f"tensor '{name}' holds NaN or Inf",
            limit="weights must be finite",
            remedy="download the checkpoint again, or repair it",
        )


def open_checkpoint(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Args:
        path: checkpoint folder or GGUF file.
        allow_pickle: whether pickled weights may be opened.

    Raises:
        TransmlaError: if there are no weights, if a file is missing, cut off or of another format, if a tensor has
            another dtype than float32, float16 or bfloat16, or if the weights are pickled and ``allow_pickle`` is off.
    """
    if path.is_file() and path.suffix == ".gguf":
        weights = GgufWeights(path)
        size = DTYPE.itemsize * sum(math.prod(shape) for shape in weights.shapes.values())
        dtypes = dict.fromkeys(weights.shapes, DTYPE)
        return Checkpoint(path.parent, weights.shapes, weights.read, dtypes=dtypes, size=size, gguf=path.name)
    if not (path / "config.json").is_file():
        raise TransmlaError(
            f"no config.json in '{path}'",
            limit="a checkpoint folder holds config.json and safetensors files",
            remedy="check SOURCE",
        )
    shards = shards_of(path)
    return _open_safetensors(path, shards) if shards else _open_pickle(path, allow_pickle)


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds all of its safetensors files. Pickled weights are not looked for."""
    shards = shards_of(folder)
    return bool(shards) and all((folder / shard).is_file() for shard in shards)


def describe_tensors(folder: Path, stored: Mapping[str, Stored]) -> Checkpoint:
    """Return a checkpoint whose weights are not on this machine, for decisions that need shapes only.

    Args:
        folder: local folder with the config.
        stored: the tensors by name, as the headers of the files say.

    Raises:
        TransmlaError: if a tensor is neither float32, float16 or bfloat16 nor packed in a layout that is read.
    """

    def read(name: str) -> Tensor:
        raise AssertionError(f"'{name}' is not on this machine")

    return _from_headers(folder, stored, read, headers_only=True)


def _open_safetensors(folder: Path, shards: list[str]) -> Checkpoint:
    from safetensors import safe_open

    stored = read_headers(folder, shards)

    def read(name: str) -> Tensor:
        # Open the file for each tensor: a mapped file keeps its pages in memory until its last tensor is freed.
        with safe_open(stored[name].file, framework="pt") as handle:
            return handle.get_tensor(name)

    return _from_headers(folder, stored, read)


def _from_headers(
    folder: Path, stored: Mapping[str, Stored], read: Callable[[str], Tensor], *, headers_only: bool = False
) -> Checkpoint:
    """Return the checkpoint of ``stored`` tensors, whose packed weights are dequantised when they are read."""
    settings, dtype = quantisation(folder), stored_dtype(folder)
    packed, consumed = packed_weights(stored, settings) if settings else ({}, set[str]())
    plain = {name: tensor for name, tensor in stored.items() if name not in consumed}
    for name, tensor in plain.items():
        if tensor.dtype not in _DTYPES:
            raise TransmlaError(
                f"tensor '{name}' is stored as {tensor.dtype}",
                limit="weights must be float32, float16 or bfloat16",
                remedy="convert the unquantised checkpoint",
            )
    shapes = {name: tensor.shape for name, tensor in plain.items()}
    shapes |= {name: weight.shape for name, weight in packed.items()}
    dtypes = {name: _DTYPES[tensor.dtype] for name, tensor in plain.items()} | dict.fromkeys(packed, dtype)
    return Checkpoint(
        folder,
        shapes,
        lambda name: packed[name].read(read, dtype) if name in packed else read(name),
        dtypes=dtypes,
        size=sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()),
        headers_only=headers_only,
    )


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
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    dtypes = {name: t.dtype for name, t in tensors.items()}
    return Checkpoint(folder, shapes, tensors.__getitem__, dtypes=dtypes, size=sum(t.nbytes for t in tensors.values()))
