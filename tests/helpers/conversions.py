"""Conversions of a tiny source in the working directory, whose equal runs write equal bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers.tiny_sources import build_model, build_tokenizer
from transmla.recipe import Recipe, parse_recipe

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def recipe(**settings: Any) -> Recipe:
    """Return a recipe with paths relative to the working directory, so that equal runs write equal files."""
    calibration = {"source": "text.txt", "sequences": 4, "length": 32, **settings.pop("calibration", {})}
    values = {"source": "source", "output": "out", "calibration": calibration, "device": "cpu"}
    return parse_recipe(values | settings, "test")


def write_source(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **config: Any) -> None:
    build_model(**config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    build_tokenizer(folder)


def write_text(file: Path) -> None:
    picks = torch.randint(0, len(LETTERS), (2000,), generator=torch.Generator().manual_seed(1))
    file.write_text(" ".join(LETTERS[i] for i in picks))
