"""A source that can be converted: found, described, checked, and the text to calibrate it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transmla.artifacts import AttentionSpec
from transmla.families.base import Family
from transmla.recipe import Recipe
from transmla.source.check_tensors import check_tensors
from transmla.source.checkpoint import Checkpoint, open_checkpoint
from transmla.source.describe import describe, empty_model, family_of, read_config
from transmla.source.device import is_fast_in_bfloat16
from transmla.source.locate import resolve_source


@dataclass(frozen=True)
class Source:
    """A source that was found convertible: its shapes are checked, no weight has been read."""

    path: Path
    config: Any
    # The whole model, without weights.
    model: Any
    spec: AttentionSpec
    family: Family
    checkpoint: Checkpoint
    dtype: str


def open_source(recipe: Recipe) -> Source:
    """Find, describe and check a source; every refusal that needs no weights happens here."""
    known = resolve_source(recipe.source, revision=recipe.revision, weights=False)
    config = read_config(known)
    family = family_of(config)
    model = empty_model(config)
    spec = describe(config, model)
    path = resolve_source(recipe.source, revision=recipe.revision, allow_pickle=recipe.allow_pickle)
    checkpoint = open_checkpoint(path, allow_pickle=recipe.allow_pickle)
    check_tensors(checkpoint.shapes, config, family, model)
    dtype = str(checkpoint.read(family.tensors["embed"]).dtype).removeprefix("torch.")
    return Source(path, config, model, spec, family, checkpoint, dtype)


def runs_in_bfloat16(source: Source, device: torch.device) -> bool:
    """Whether the source is run in bfloat16: it is stored in it, and the device is faster with it."""
    return source.dtype == "bfloat16" and is_fast_in_bfloat16(device)
