"""Open a source: resolve its name, describe its attention, and check its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from transmla.artifacts import AttentionSpec
from transmla.families.base import Family
from transmla.recipe import Recipe
from transmla.source.card import read_card
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
        config: the transformers config. Its ``tie_word_embeddings`` says whether the head is the embedding.
        model: the causal LM without weights.
        spec: description of the attention.
        family: the model family.
        checkpoint: reads the weights.
        dtype: dtype in which the embedding is stored, such as "bfloat16".
        card: metadata for the export's model card, such as the licence (``card.read_card``).
    """

    path: Path
    config: Any
    model: Any
    spec: AttentionSpec
    family: Family
    checkpoint: Checkpoint
    dtype: str
    card: dict[str, Any] = field(default_factory=dict)


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
    if config.tie_word_embeddings and _has_own_head(checkpoint, family):
        config.tie_word_embeddings = False
        model = empty_model(config)
        spec = describe(config, model)
    check_tensors(checkpoint.shapes, config, family, model)
    dtype = str(checkpoint.read(family.tensors["embed"]).dtype).removeprefix("torch.")
    card = read_card(path)
    return Source(path, config, model, spec, family, checkpoint, dtype, card)


def _has_own_head(checkpoint: Checkpoint, family: Family) -> bool:
    """Return whether the checkpoint holds a head with other values than its embedding.

    transformers then uses that head, although the config says that the two are tied.
    """
    names = family.tensors["embed"], family.tensors["head"]
    if not set(names) <= set(checkpoint.shapes):
        return False
    embedding, head = (checkpoint.read(name) for name in names)
    wide = torch.promote_types(embedding.dtype, head.dtype)
    return not torch.equal(embedding.to(wide), head.to(wide))


def default_generation(source: Source) -> Any:
    """Return the generation config that transformers gives the source's model if it has no file for it."""
    from transformers import GenerationConfig

    if source.path.is_dir():
        # Old models have such settings in their config.json, from which the config class drops them.
        return GenerationConfig.from_pretrained(source.path, config_file_name="config.json", _from_model_config=True)
    return GenerationConfig.from_model_config(source.config)


def runs_in_bfloat16(source: Source, device: torch.device) -> bool:
    """Return whether to run the source in bfloat16: its weights are bfloat16, and the device is faster with it."""
    return source.dtype == "bfloat16" and is_fast_in_bfloat16(device)
