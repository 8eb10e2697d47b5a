"""Read the tensors of a GGUF file one at a time, under the names and in the layout that transformers gives them.

transformers' own tables say which tensor of the file becomes which of the model's, and how the values are rearranged:
Llama's queries and keys are permuted, Gemma's norms are stored plus one. A tensor is dequantised when it is read, in
blocks of rows, so no tensor is ever held in float32 as a whole unless its values are rearranged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor

from transmla.boundary import boundary
from transmla.errors import TransmlaError
from transmla.source.describe import empty_model
from transmla.source.gguf_header import GgufTensor, check_header, read_header, without_tensors
from transmla.source.load import load_config, need_gguf

# The precision in which a GGUF source is read.
DTYPE = torch.bfloat16
# Values that are dequantised at once. The dequantisation needs about ten times their bytes.
BLOCK = 2**22
# Tensors of the file that hold one matrix of every expert. transformers stacks gate and up in this order.
_EXPERTS = re.compile(r"(?P<name>.+\.ffn_(?P<part>gate|up|down)_exps)\.weight")
_STACKED = ("gate", "up")


@dataclass(frozen=True)
class _Entry:
    """One tensor of the model.

    Attributes:
        shape: shape of the tensor in the model.
        parts: the tensors of the file that make it: one, or gate and up of all experts.
        experts: whether the parts hold one matrix of every expert.
    """

    shape: tuple[int, ...]
    parts: tuple[GgufTensor, ...]
    experts: bool = False


class GgufWeights:
    """The tensors of a GGUF file by the names that they have in the transformers model.

    Attributes:
        shapes: shape of every tensor, by name.
    """

    def __init__(self, path: Path) -> None:
        """Read the header of the file; no tensor is read.

        Raises:
            TransmlaError: if ``gguf`` is not installed, or the file is damaged, scales its rotary frequencies, holds a
                tensor that the model lacks, or has values of a type that ``gguf`` cannot dequantise.
        """
        need_gguf()
        self.path = path
        with boundary(f"'{path.name}' cannot be read as GGUF", remedy="download it again"):
            check_header(path)
            _refuse_lost_scaling(path)
            self._processor, self._names, shapes = _tables(path)
            self._entries = _entries(path, self._names, shapes)
            # One row of each type: `gguf` cannot dequantise all of them.
            for tensor in {tensor.kind: tensor for entry in self._entries.values() for tensor in entry.parts}.values():
                self._dequantise(tensor, 0, 1)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> Tensor:
        """Return one tensor in bfloat16.

        Raises:
            TransmlaError: if the file is cut off, or does not hold the tensor in the shape that it says.
        """
        entry = self._entries[name]
        with boundary(f"'{self.path.name}' cannot be read as GGUF", remedy="download it again"):
            tensor = self._read_experts(name, entry) if entry.experts else self._read_one(entry)
            if tensor.shape != entry.shape:
                raise ValueError(f"'{name}' has the shape {list(tensor.shape)}, not {list(entry.shape)}")
        return tensor

    def _read_one(self, entry: _Entry) -> Tensor:
        (tensor,) = entry.parts
        # A view of one zero shows whether transformers rearranges the values.
        stub = numpy.broadcast_to(numpy.float32(0), tensor.shape)
        if self._process(stub, tensor) is not stub:
            whole = self._dequantise(tensor, 0, _rows(tensor)).reshape(tensor.shape)
            return torch.from_numpy(numpy.array(self._process(whole, tensor))).to(DTYPE)
        values = torch.empty(_rows(tensor), tensor.shape[-1], dtype=DTYPE)
        rows = max(1, BLOCK // tensor.shape[-1])
        for first in range(0, _rows(tensor), rows):
            block = self._dequantise(tensor, first, min(first + rows, _rows(tensor)))
            values[first : first + rows] = torch.from_numpy(block)
        return values.reshape(entry.shape)

    def _read_experts(self, name: str, entry: _Entry) -> Tensor:
        values = torch.empty(entry.shape, dtype=DTYPE)
        for expert in range(entry.shape[0]):
            parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
            for part in entry.parts:
                rows = part.shape[1]
                matrix = self._dequantise(part, expert * rows, (expert + 1) * rows)
                self._process(matrix[None], part, parsed)
            values[expert] = parsed["tensors"][name][0]
        return values

    def _process(self, values: Any, tensor: GgufTensor, parsed: dict[str, dict[str, Tensor]] | None = None) -> Any:
        """Rearrange values as transformers does; values of experts are stored in ``parsed`` instead."""
        return self._processor.process(
            weights=values,
            name=tensor.name,
            tensor_key_mapping=self._names,
            parsed_parameters={"tensors": {}} if parsed is None else parsed,
        ).weights

    def _dequantise(self, tensor: GgufTensor, first: int, last: int) -> Any:
        """Return the rows ``first`` to ``last`` of a tensor [..., n] as a float32 array [rows, n]."""
        from gguf import GGMLQuantizationType, dequantize, quant_shape_to_byte_shape

        kind = GGMLQuantizationType(tensor.kind)
        (width,) = quant_shape_to_byte_shape(tensor.shape[-1:], kind)
        packed = numpy.fromfile(self.path, numpy.uint8, (last - first) * width, offset=tensor.start + first * width)
        if len(packed) < (last - first) * width:
            raise ValueError(f"it ends inside tensor '{tensor.name}'")
        return dequantize(packed.reshape(last - first, width), kind)


def _rows(tensor: GgufTensor) -> int:
    return prod(tensor.shape[:-1])


def _tables(path: Path) -> tuple[Any, dict[str, str], dict[str, tuple[int, ...]]]:
    """Return what transformers knows of a GGUF file's model.

    Returns:
        The processor that rearranges values, the model's name of each tensor by its name in the file, and the shape of
        each of the model's tensors.
    """
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    with without_tensors(path) as header:
        settings = load_gguf_checkpoint(header, return_tensors=False)["config"]
    model = empty_model(load_config(path))
    processor = TENSOR_PROCESSORS.get(read_header(path).architecture, TensorProcessor)(config=settings)
    # The names of the whole model's tensors are enough. transformers would also look up those of every module alone.
    whole = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=list)
    names = get_gguf_hf_weights_map(whole, processor)
    return processor, names, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _entries(path: Path, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Entry]:
    """Return the model's tensors that the file holds, in the model's order.

    Args:
        path: the GGUF file.
        names: the model's name of each tensor by its name in the file.
        shapes: shape of each of the model's tensors, by name.

    Raises:
        TransmlaError: if the file holds a tensor that the model lacks.
    """
    found: dict[str, _Entry] = {}
    experts: dict[str, dict[str, GgufTensor]] = {}
    for tensor in read_header(path).tensors:
        match = _EXPERTS.fullmatch(tensor.name)
        if tensor.name in names:
            name = names[tensor.name]
            expected = shapes.get(name, tensor.shape)
            # Some vectors of the file are matrices of one row in the model.
            as_rows = (1,) * (len(expected) - len(tensor.shape)) + tensor.shape
            found[name] = _Entry(as_rows, (tensor,))
        elif match and match["name"] in names:
            experts.setdefault(names[match["name"]], {})[match["part"]] = tensor
        else:
            raise TransmlaError(
                f"'{path.name}' holds the tensor '{tensor.name}'",
                limit="transformers does not read it, and nothing is dropped silently",
                remedy="convert the original checkpoint folder",
            )
    for name, parts in experts.items():
        if set(parts) == {"down"}:
            found[name] = _Entry(parts["down"].shape, (parts["down"],), experts=True)
        elif set(parts) == set(_STACKED) and parts["gate"].shape == parts["up"].shape:
            count, rows, width = parts["gate"].shape
            found[name] = _Entry((count, 2 * rows, width), tuple(parts[part] for part in _STACKED), experts=True)
    return {name: found[name] for name in shapes if name in found}


def _refuse_lost_scaling(path: Path) -> None:
    """Refuse a GGUF file with RoPE scaling. transformers ignores the scaling, which silently changes the model.

    Raises:
        TransmlaError: if the file scales its rotary frequencies.
    """
    header = read_header(path)
    kind = next((value for name, value in header.fields.items() if name.endswith(".rope.scaling.type")), "none")
    if kind != "none" or any(tensor.name == "rope_freqs.weight" for tensor in header.tensors):
        raise TransmlaError(
            f"'{path.name}' scales its rotary frequencies",
            limit="transformers ignores the RoPE scaling in a GGUF file",
            remedy="convert the original checkpoint folder",
        )
