"""Pack the weights of a saved tiny source as FP8 releases and compressed-tensors do."""

from __future__ import annotations

import json
import shutil
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Scheme → ``quantization_config`` of a config.json.
SCHEMES: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]},
    "fp8-whole-blocks": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [4, 8]},
    "fp8-tensor": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
}
for _name, _format, _weights in (
    ("float-channel", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ("float-tensor", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    (
        "float-block",
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ),
    ("int8-channel", "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    ("int4-group", "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}),
    ("int8-packed", "pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
):
    SCHEMES[_name] = {
        "quant_method": "compressed-tensors",
        "format": _format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **_weights}}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def pack_source(source: Path, packed: Path, plain: Path, scheme: str) -> None:
    """Write two copies of ``source``: ``packed`` by a scheme, and ``plain`` with the values that this leaves."""
    settings = SCHEMES[scheme]
    stored: dict[str, Tensor] = {}
    dequantised: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.ndim == 2 and "layers" in name and ".gate.weight" not in name:
            tensors, tensor = _pack(name.removesuffix("weight"), tensor.float(), settings)
            stored |= tensors
        else:
            stored[name] = tensor
        dequantised[name] = tensor.to(torch.bfloat16)
    for folder, tensors in ((packed, stored), (plain, dequantised)):
        shutil.copytree(source, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
        changes = {"quantization_config": settings} if folder == packed else {}
        (folder / "config.json").write_text(json.dumps(config | changes))


def _pack(base: str, weight: Tensor, settings: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the stored tensors of one weight, and the weight that they stand for, one value at a time."""
    rows, columns = weight.shape
    own = settings.get("config_groups", {}).get("group_0", {}).get("weights", {})
    height, width = {
        "channel": (1, columns),
        "tensor": (rows, columns),
        "group": (1, own.get("group_size")),
    }.get(own.get("strategy", ""), own.get("block_structure") or settings.get("weight_block_size") or (rows, columns))
    integers = own.get("type") == "int"
    largest = float(2 ** (own["num_bits"] - 1) - 1) if integers else 448.0
    scales = torch.empty(ceil(rows / height), ceil(columns / width))
    values = torch.empty(rows, columns)
    result = torch.empty(rows, columns)
    dtype = torch.float32 if settings["quant_method"] == "fp8" else torch.bfloat16
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            scale = (weight[block].abs().max() / largest).to(dtype).float()
            scaled = (weight[block] / scale).clamp(-largest, largest)
            values[block] = scaled.round().long() if integers else scaled.to(torch.float8_e4m3fn).float()
            scales[i, j] = scale
            result[block] = values[block] * scale
    suffix = "weight_scale_inv" if settings["quant_method"] == "fp8" else "weight_scale"
    grid = scales.to(dtype)[0] if own.get("strategy") == "tensor" else scales.to(dtype)
    tensors = {base + suffix: grid}
    if settings.get("activation_scheme") == "static":
        tensors = {base + suffix: scales.to(dtype).reshape(()), base + "input_scale": torch.ones(1)}
    if settings.get("format") == "pack-quantized":
        tensors[base + "weight_packed"] = _packed(values.long(), own["num_bits"])
        tensors[base + "weight_shape"] = torch.tensor([rows, columns])
    else:
        tensors[base + "weight"] = values.to(torch.int8 if integers else torch.float8_e4m3fn)
    return tensors, result


def _packed(values: Tensor, bits: int) -> Tensor:
    """Return signed integers [rows, n] packed into int32, the first in the lowest bits."""
    rows, columns = values.shape
    each = 32 // bits
    words = torch.zeros(rows, columns // each, dtype=torch.int64)
    for i in range(columns):
        words[:, i // each] |= (values[:, i] + 2 ** (bits - 1)) << bits * (i % each)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
