"""A source that can be converted: found, described, checked, and the text to calibrate it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import AttentionSpec
from transmla.auto import register
from transmla.calibrate import bfloat16_pays
from transmla.checkpoint import Checkpoint, load_model, open_checkpoint, split_gguf
from transmla.data import load_blocks, sample_self
from transmla.errors import TransmlaError
from transmla.families.base import Family
from transmla.locate import resolve_source
from transmla.progress import Reporter
from transmla.recipe import Recipe
from transmla.spec import check_tensors, describe, empty_model, family_of, read_config


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


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TransmlaError(
            f"device '{name}' is not usable", limit=str(error).splitlines()[0], remedy="use --device cpu"
        ) from error
    return device


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


def computes_in_bfloat16(source: Source, device: torch.device) -> bool:
    """Whether the source is run in bfloat16: it is stored in it, and the device is faster with it."""
    return source.dtype == "bfloat16" and bfloat16_pays(device)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint folder or GGUF file.

    Raises:
        TransmlaError: if there is none.
    """
    from transformers import AutoTokenizer

    folder, extra = split_gguf(path)
    # An export's config would ask whether its code may be run.
    register()
    try:
        return AutoTokenizer.from_pretrained(folder, **extra)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TransmlaError(
            f"no tokenizer in '{folder}'",
            limit="calibration, evaluation and the export itself need one",
            remedy="add tokenizer.json and tokenizer_config.json to that folder",
        ) from error


def check_length(spec: AttentionSpec, length: int) -> None:
    """A calibration sequence must fit the source's context, and of longrope the part with the short frequencies."""
    short = min((kind.short_length for kind in spec.kinds if kind.short_length is not None), default=length)
    if length > short:
        raise TransmlaError(
            f"calibration sequences of {length} tokens are longer than {short}",
            limit="that far longrope turns by its short frequencies, which layers are converted with",
            remedy="lower --calibration-length",
        )
    if length > spec.max_position_embeddings:
        raise TransmlaError(
            f"calibration sequences of {length} tokens are longer than the source's context",
            limit=f"at most {spec.max_position_embeddings}",
            remedy="lower --calibration-length",
        )


def calibration_tokens(recipe: Recipe, source: Source, tokenizer: Any, report: Reporter) -> Tensor:
    """Calibration tokens [sequences, length], from text or sampled from the source itself."""
    want = recipe.calibration
    if want.source != "self":
        blocks = load_blocks(
            want.source,
            tokenizer,
            sequences=want.sequences,
            length=want.length,
            split=want.split,
            column=want.column,
        )
        if int(blocks.max()) >= source.spec.vocab_size:
            raise TransmlaError(
                f"the tokenizer produces token {int(blocks.max())}",
                limit=f"the model's vocabulary has {source.spec.vocab_size}",
                remedy="use the tokenizer that belongs to this model",
            )
        return blocks
    device = pick_device(recipe.device)
    dtype = torch.bfloat16 if computes_in_bfloat16(source, device) else torch.float32
    report.stage("sampling calibration text", want.sequences)
    model = load_model(source.path, dtype=dtype).to(device)
    return sample_self(
        model,
        tokenizer,
        sequences=want.sequences,
        length=want.length,
        seed=recipe.seed,
        progress=lambda done, _: report.advance(done),
    )
