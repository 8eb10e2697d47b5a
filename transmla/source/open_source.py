"""Open a source: resolve its name, describe its attention, and check its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from transmla.artifacts import AttentionSpec
from transmla.families.base import PACKED, Family
from transmla.recipe import Recipe
from transmla.source.card import read_card
from transmla.source.check_tensors import check_tensors
from transmla.source.checkpoint import Checkpoint, describe_tensors, has_weights, open_checkpoint
from transmla.source.describe import describe, empty_model, family_of, read_config
from transmla.source.device import is_fast_in_bfloat16
from transmla.source.locate import check_source, hub_headers, refuse_revision, resolve_source
from transmla.source.packed_weights import check_packing


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


def open_source(recipe: Recipe, *, weights: bool = True) -> Source:
    """Resolve, describe and check the source of a recipe.

    The config is checked before any weights are downloaded or unpacked.

    Args:
        recipe: the recipe.
        weights: whether the weights will be read. Without, only headers are: a Hub model is not downloaded, and a GGUF
            file not unpacked. The weights of the returned source may not be readable.

    Raises:
        TransmlaError: if the source is missing, unreadable, or cannot be converted, or if a local one has a revision.
    """
    refuse_revision(recipe.source, recipe.revision)
    path = resolve_source(recipe.source, revision=recipe.revision, weights=False)
    described = _describe(path)
    if not weights:
        return _open(path, described, _open_headers(path, recipe))
    complete = resolve_source(recipe.source, revision=recipe.revision, allow_pickle=recipe.allow_pickle)
    if complete != path:  # a GGUF file was unpacked
        described = _describe(complete)
    return _open(complete, described, open_checkpoint(complete, allow_pickle=recipe.allow_pickle))


def _open_headers(path: Path, recipe: Recipe) -> Checkpoint:
    """Open the checkpoint of a recipe's source, whose config lies in ``path``, without downloading weights.

    The exception are pickled weights on the Hub, which have no headers.
    """
    if check_source(recipe.source) is None and not has_weights(path):
        # The folder of a snapshot has the name of its commit.
        stored = hub_headers(recipe.source, path.name)
        if stored is not None:
            return describe_tensors(path, stored)
        path = resolve_source(recipe.source, revision=recipe.revision, allow_pickle=recipe.allow_pickle)
    return open_checkpoint(path, allow_pickle=recipe.allow_pickle)


def open_path(path: Path, *, allow_pickle: bool = False) -> Source:
    """Describe and check a source that lies in ``path``, a local checkpoint folder or GGUF file.

    Raises:
        TransmlaError: if the source is unreadable, or cannot be converted.
    """
    return _open(path, _describe(path), open_checkpoint(path, allow_pickle=allow_pickle))


def _describe(path: Path) -> tuple[Any, Family, Any, AttentionSpec]:
    """Return the config in ``path``, its family, the model without weights, and the description of the attention."""
    config = read_config(path)
    family = family_of(config)
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        if settings.get("quant_method") in PACKED:
            check_packing(family.name, settings)
        # The weights are dequantised when they are read.
        del config.quantization_config
    model = empty_model(config)
    return config, family, model, describe(config, model)


def _open(path: Path, described: tuple[Any, Family, Any, AttentionSpec], checkpoint: Checkpoint) -> Source:
    config, family, model, spec = described
    if config.tie_word_embeddings and _has_own_head(checkpoint, family):
        config.tie_word_embeddings = False
        model = empty_model(config)
        spec = describe(config, model)
    check_tensors(checkpoint.shapes, config, family, model)
    dtype = str(checkpoint.dtypes[family.tensors["embed"]]).removeprefix("torch.")
    card = read_card(path)
    return Source(path, config, model, spec, family, checkpoint, dtype, card)


def _has_own_head(checkpoint: Checkpoint, family: Family) -> bool:
    """Return whether the checkpoint holds a head with other values than its embedding.

    transformers then uses that head, although the config says that the two are tied. Without the weights, the config
    is believed.
    """
    names = family.tensors["embed"], family.tensors["head"]
    if checkpoint.headers_only or not set(names) <= set(checkpoint.shapes):
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
