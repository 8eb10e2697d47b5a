"""Read weights that a checkpoint stores with scales: FP8 in blocks, and the simple layouts of compressed-tensors.

A weight is one tensor of values and one of scales, and is dequantised when it is read, some rows at a time. The rest of
a conversion sees an ordinary tensor in the precision that the config names.

- FP8 (DeepSeek, Qwen): ``weight`` and ``weight_scale_inv``, one scale for each block of ``weight_block_size``.
- compressed-tensors: ``weight`` in FP8 or INT8 and ``weight_scale``, one for all or for each row, block or group; or
  ``weight_packed``, integers of 4 or 8 bits packed into int32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.boundary import boundary, read_json_object
from transmla.errors import TransmlaError
from transmla.families.base import PACKED
from transmla.guard.headers import Stored

# safetensors' names of the dtypes of values that have a scale, and of scales.
_VALUES = ("F8_E4M3", "I8")
_SCALES = ("F32", "BF16", "F16")
# Ends of the names of a weight's scales. The first that is there counts.
_SCALE_NAMES = ("weight_scale_inv", "weight_scale")
# Ends of the names of tensors that only a runtime of quantised models reads: scales of activations.
_ACTIVATIONS = ("input_scale", "activation_scale")
# Layouts of compressed-tensors that are read.
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
# Values that are dequantised at once.
_BLOCK = 2**22


@dataclass(frozen=True)
class PackedWeight:
    """One weight that is stored with scales.

    Attributes:
        values: name of the tensor with the values.
        scales: name of the tensor with the scales.
        shape: shape [rows, columns] of the weight.
        block: rows and columns that share one scale.
        bits: bits of each integer that is packed into int32; None if every value is a number of its own.
    """

    values: str
    scales: str
    shape: tuple[int, int]
    block: tuple[int, int]
    bits: int | None = None

    def read(self, raw: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        """Return the weight in ``dtype``; ``raw`` reads a stored tensor."""
        values, (rows, columns) = raw(self.values), self.shape
        scales = raw(self.scales).float().reshape(ceil(rows / self.block[0]), ceil(columns / self.block[1]))
        weight = torch.empty(rows, columns, dtype=dtype)
        step = max(1, _BLOCK // (columns * self.block[0])) * self.block[0]
        for first in range(0, rows, step):
            part = values[first : first + step]
            numbers = part.float() if self.bits is None else _unpack(part, self.bits)[:, :columns].float()
            factors = scales[first // self.block[0] : ceil((first + step) / self.block[0])]
            factors = factors.repeat_interleave(self.block[0], 0)[: len(part)]
            weight[first : first + step] = numbers * factors.repeat_interleave(self.block[1], 1)[:, :columns]
        return weight


def quantisation(folder: Path) -> dict[str, Any] | None:
    """Return the ``quantization_config`` of a checkpoint whose packed weights are read; None without one.

    Raises:
        TransmlaError: if they cannot be read.
    """
    config = read_json_object(folder / "config.json") or {}
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") not in PACKED:
        return None
    check_packing(str(config.get("model_type")), settings)
    return settings


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the precision that the config names, in which packed weights are read; bfloat16 by default."""
    config = read_json_object(folder / "config.json") or {}
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return dtype if dtype in (torch.float32, torch.float16) else torch.bfloat16


def check_packing(family: str, settings: Mapping[str, Any]) -> None:
    """Check by its config that the packed weights of a model can be read.

    Args:
        family: the model family.
        settings: the config's ``quantization_config``, with a method of PACKED.

    Raises:
        TransmlaError: if they cannot.
    """
    what = f"{family}: cannot read the quantization_config of config.json"
    with boundary(what, remedy="use the config.json that belongs to these weights"):
        _check_settings(family, settings)


def _check_settings(family: str, settings: Mapping[str, Any]) -> None:
    if settings["quant_method"] == "fp8":
        if settings.get("expert_dtype", "fp8") != "fp8" or settings.get("scale_fmt", "float") not in ("float", None):
            raise _refuse(family, "FP8 weights with experts in FP4, or with scales that are powers of two,")
        return
    groups = settings.get("config_groups") or {}
    layouts = {group.get("format") or settings.get("format") for group in groups.values() if isinstance(group, dict)}
    for layout in layouts or {settings.get("format")}:
        if layout not in _FORMATS:
            raise _refuse(family, f"compressed-tensors weights of the format {layout}")
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise _refuse(family, "compressed-tensors weights without a description")
        if weights.get("symmetric", True) is not True:
            raise _refuse(family, "compressed-tensors weights with zero points")
        if weights.get("num_bits") not in (4, 8):
            raise _refuse(family, f"compressed-tensors weights of {weights.get('num_bits')} bits")
    if len({weights["num_bits"] for weights in _descriptions(settings)}) > 1 and "pack-quantized" in layouts:
        raise _refuse(family, "compressed-tensors weights of several widths")
    sparsity = settings.get("sparsity_config") or {}
    if sparsity and sparsity.get("format") != "dense":
        raise _refuse(family, "compressed-tensors weights that are sparse")
    if settings.get("transform_config"):
        raise _refuse(family, "compressed-tensors weights that are transformed (transform_config)")


def _refuse(family: str, what: str) -> TransmlaError:
    return TransmlaError(
        f"{family}: {what} are not supported",
        limit="of packed weights, FP8 in blocks and symmetric integers and FP8 of compressed-tensors are read",
        remedy="convert the model that they were made from, and quantise its export",
    )


def packed_weights(
    stored: Mapping[str, Stored], settings: Mapping[str, Any]
) -> tuple[dict[str, PackedWeight], set[str]]:
    """Find the packed weights among a checkpoint's tensors.

    Args:
        stored: the tensors by name, as the headers say.
        settings: the config's ``quantization_config``.

    Returns:
        The packed weights by the names that they have in the model, and the names of all tensors that belong to them.

    Raises:
        TransmlaError: if a weight has no scales, or scales of another shape than the config says.
    """
    weights: dict[str, PackedWeight] = {}
    consumed: set[str] = set()
    for name, tensor in stored.items():
        base, _, part = name.rpartition(".")
        if not (part == "weight_packed" or (part == "weight" and tensor.dtype in _VALUES)):
            continue
        scales = next((f"{base}.{end}" for end in _SCALE_NAMES if f"{base}.{end}" in stored), None)
        if scales is None or stored[scales].dtype not in _SCALES or len(tensor.shape) != 2:
            raise _wrong(name, f"its {tensor.dtype} values need scales in float32, float16 or bfloat16")
        for extra in ("weight_g_idx", "weight_zero_point"):
            if f"{base}.{extra}" in stored:
                raise _wrong(name, f"weights with '{extra}' are not supported")
        bits = _bits(settings) if part == "weight_packed" else None
        shape = tensor.shape[0], tensor.shape[1] * (1 if bits is None else 32 // bits)
        weights[f"{base}.weight"] = PackedWeight(
            name, scales, shape, _block(name, shape, stored[scales].shape, settings), bits
        )
        consumed |= {name, scales, f"{base}.weight_shape", *(f"{base}.{end}" for end in _ACTIVATIONS)}
    return weights, consumed & set(stored)


def _descriptions(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what each of compressed-tensors' groups says of its weights."""
    return [group["weights"] for group in (settings.get("config_groups") or {}).values()]


def _bits(settings: Mapping[str, Any]) -> int:
    """Return the bits of packed integers, which are the same in all groups (``check_packing``)."""
    return next((int(weights["num_bits"]) for weights in _descriptions(settings)), 4)


def _block(name: str, shape: tuple[int, int], scales: tuple[int, ...], settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns that share a scale: all, a row, or a block that the config names."""
    rows, columns = shape
    blocks = [(rows, columns), (1, columns)]
    named = [
        settings.get("weight_block_size"),
        *(weights.get("block_structure") for weights in _descriptions(settings)),
    ]
    blocks += [(size[0], size[1]) for size in named if isinstance(size, list) and len(size) == 2 and _are_counts(size)]
    widths = [weights.get("group_size") for weights in _descriptions(settings)]
    blocks += [(1, width) for width in widths if isinstance(width, int) and width > 0]
    # One scale may be a number, and one for each row a vector.
    grid = (*scales, 1, 1)[:2]
    for block in blocks:
        if (ceil(rows / block[0]), ceil(columns / block[1])) == grid:
            return block
    raise _wrong(name, f"scales of the shape {list(scales)} fit no block that config.json names")


def _are_counts(values: list[Any]) -> bool:
    return all(isinstance(value, int) and value > 0 for value in values)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the signed integers [rows, n·32/bits] that are packed into int32 [rows, n], lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(1) - 2 ** (bits - 1)


def _wrong(name: str, limit: str) -> TransmlaError:
    return TransmlaError(
        f"the packed weight '{name}' cannot be read",
        limit=limit,
        remedy="convert the model that it was made from, and quantise its export",
    )
