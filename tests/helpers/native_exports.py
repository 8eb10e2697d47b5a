"""A tiny native export of three layers, whose widths fit some blocks of GGUF's types and miss others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers.conversions import write_text
from helpers.tiny_sources import build_model, build_tokenizer
from transmla.convert.pipeline import convert
from transmla.recipe import parse_recipe

LAYERS, HEADS = 3, 4
# Rows of hidden_size fit Q4_K, rows of the heads (4 × 48) fit Q8_0 only.
SHAPE = {"num_hidden_layers": LAYERS, "hidden_size": 256, "intermediate_size": 512, "head_dim": 48}


def native_export(folder: Path, *, family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Convert a random model in ``folder``, and return the export's folder."""
    build_model(family, "mha", **SHAPE).to(dtype).save_pretrained(folder / "source")
    build_tokenizer(folder / "source")
    write_text(folder / "text.txt")
    calibration = {"source": str(folder / "text.txt"), "sequences": 4, "length": 32}
    values = {"source": str(folder / "source"), "output": str(folder / "out"), "calibration": calibration}
    values |= {"reconstruct": "off", "heal": "off", "device": "cpu", "format": "native"}
    convert(parse_recipe(values | {"qk_rope_head_dim": 24, "kv_lora_rank": 64} | settings, "test"))
    return folder / "out"
