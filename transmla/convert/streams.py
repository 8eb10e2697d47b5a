"""The hidden states that a conversion carries from one layer to the next."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.files import TEMPORARY

# Prefix of the factors fitted ahead in a saved file: "fitted.LAYER.NAME".
AHEAD = "fitted"
# Prefix of an empty tensor that stands for hidden states saved under another name: "same.NAME.OTHER". All are the
# source's until a layer is converted.
SAME = "same"


@dataclass(frozen=True)
class Streams:
    """Hidden states [N, T, D] of all calibration sequences that enter a layer.

    Attributes:
        source: hidden states computed by the source's layers.
        first_pass: hidden states computed by layers without RoPE; None if the method has no first pass.
        converted: hidden states computed by the converted layers; None if layers are not fitted.
        held_source: hidden states [n, T, D] of held-out sequences, computed by the source's layers; None without any.
        held_export: hidden states of the same sequences, computed by the layers as they are written.
        ahead: layer → name → tensor: factors that the last window fitted for layers that are not yet final.
    """

    source: Tensor
    first_pass: Tensor | None = None
    converted: Tensor | None = None
    held_source: Tensor | None = None
    held_export: Tensor | None = None
    ahead: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Streams:
        """Return the streams with ``change`` applied to every tensor; streams that are one tensor remain one."""
        changed = {id(tensor): change(tensor) for tensor in {id(t): t for t in self._all()}.values()}
        hidden = {name: changed[id(stream)] for name, stream in self.hidden().items()}
        ahead = {layer: {name: changed[id(t)] for name, t in ts.items()} for layer, ts in self.ahead.items()}
        return Streams(**hidden, ahead=ahead)

    def hidden(self) -> dict[str, Tensor]:
        """Return the hidden states [N, T, D] that are not None, by name."""
        named: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ahead"}
        return {name: stream for name, stream in named.items() if stream is not None}

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by a flat name, on the CPU, for a file."""
        named = self.hidden() | {f"{AHEAD}.{i}.{name}": t for i, ts in self.ahead.items() for name, t in ts.items()}
        tensors, names = {}, dict[int, str]()
        for name, tensor in named.items():
            other = names.setdefault(id(tensor), name)
            if other == name:
                tensors[name] = tensor.cpu()
            else:
                tensors[f"{SAME}.{name}.{other}"] = torch.empty(0)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Streams:
        """Return the streams that ``to_tensors`` flattened."""
        hidden, ahead = {}, dict[int, dict[str, Tensor]]()
        for key, tensor in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == AHEAD:
                layer, _, name = rest.partition(".")
                ahead.setdefault(int(layer), {})[name] = tensor
            elif kind == SAME:
                name, _, other = rest.partition(".")
                hidden[name] = tensors[other]
            else:
                hidden[key] = tensor
        return cls(**hidden, ahead=ahead)

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._all())

    def nearest(self, device: torch.device, copies: int, beside: int) -> Streams:
        """Return the streams on the GPU ``device`` if its free memory suffices; otherwise unchanged.

        Args:
            device: the device that converts.
            copies: number of copies of all streams that are needed at once.
            beside: bytes that are needed beside them.
        """
        if device.type != "cuda":
            return self
        torch.cuda.empty_cache()  # sampling before the conversion has reserved most of the memory
        if self.nbytes() * copies + beside > torch.cuda.mem_get_info(device)[0]:
            return self
        return self.map(lambda stream: stream.to(device))

    def _all(self) -> list[Tensor]:
        return [*self.hidden().values(), *(t for tensors in self.ahead.values() for t in tensors.values())]


def empty_like(stream: Tensor, device: torch.device, folder: Path | None = None) -> Tensor:
    """Return an empty tensor like ``stream``; one in the computer's memory is pinned if ``device`` is a GPU.

    Args:
        stream: hidden states [N, T, D].
        device: the device that reads the tensor.
        folder: folder of the file that holds the tensor, if the memory does not; None puts the tensor into the memory.
    """
    if folder is not None and stream.device.type == "cpu":
        return mapped(stream.shape, folder)
    pinned = device.type == "cuda" and stream.device.type == "cpu"
    return torch.empty(stream.shape, dtype=stream.dtype, device=stream.device, pin_memory=pinned)


def mapped(shape: tuple[int, ...], folder: Path) -> Tensor:
    """Return a float32 tensor of zeros whose values lie in a file, of which Linux keeps in memory what has room.

    The file has no name, so its space is free again when the tensor is, and also when the process is killed.

    Args:
        shape: shape of the tensor.
        folder: folder on the disk that holds the file.

    Raises:
        OSError: if the disk is full.
    """
    size = torch.Size(shape).numel()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=TEMPORARY) as file:
        if hasattr(os, "posix_fallocate"):  # otherwise a full disk would kill the process when it writes
            os.posix_fallocate(file.fileno(), 0, size * torch.float32.itemsize)
        return torch.from_file(file.name, shared=True, size=size, dtype=torch.float32).view(shape)
