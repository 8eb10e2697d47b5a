"""Open a source: resolve its name, describe its attention, and check its tensors."""

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
    """A source that can be converted. Its tensors' names and shapes are checked; its weights are not read yet.

    Attributes:
        path: local checkpoint folder or GGUF file.
        config: the transformers config.
        model: the causal LM without weights.
        spec: description of the attention.
        family: the model family.
        checkpoint: reads the weights.
        dtype: dtype in which the embedding is stored, such as "bfloat16".
    """

    path: Path
    config: Any
    model: Any
    spec: AttentionSpec
    family: Family
    checkpoint: Checkpoint
    dtype: str


def open_source(recipe: Recipe) -> Source:
    """Resolve, describe and check the source of a recipe.

    The config is checked before any weights are downloaded.

    Raises:
        TransmlaError: if the source is missing, unreadable, or cannot be converted.
    """
    described = _describe(resolve_source(recipe.source, revision=recipe.revision, weights=False))
    path = resolve_source(recipe.source, revision=recipe.revision, allow_pickle=recipe.allow_pickle)
    return _open(path, described, allow_pickle=recipe.allow_pickle)


def open_path(path: Path, *, allow_pickle: bool = False) -> Source:
    """Describe and check a source that lies in ``path``, a local checkpoint folder or GGUF file.

    Raises:
        TransmlaError: if the source is unreadable, or cannot be converted.
    """
    return _open(path, _describe(path), allow_pickle=allow_pickle)


def _describe(path: Path) -> tuple[Any, Family, Any, AttentionSpec]:
    """Return the config in ``path``, its family, the model without weights, and the description of the attention."""
    config = read_config(path)
    family, model = family_of(config), empty_model(config)
    return config, family, model, describe(config, model)


def _open(path: Path, described: tuple[Any, Family, Any, AttentionSpec], *, allow_pickle: bool) -> Source:
    config, family, model, spec = described
    checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
    check_tensors(checkpoint.shapes, config, family, model)
    dtype = str(checkpoint.read(family.tensors["embed"]).dtype).removeprefix("torch.")
    return Source(path, config, model, spec, family, checkpoint, dtype)


def runs_in_bfloat16(source: Source, device: torch.device) -> bool:
    """Return whether to run the source in bfloat16: its weights are bfloat16, and the device is faster with it."""
    return source.dtype == "bfloat16" and is_fast_in_bfloat16(device)
