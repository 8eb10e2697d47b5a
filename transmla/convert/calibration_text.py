"""Read or sample the calibration text of a conversion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import AttentionSpec
from transmla.errors import TransmlaError
from transmla.recipe import Recipe
from transmla.reporter import Reporter
from transmla.source.device import pick_device
from transmla.source.load import load_model
from transmla.source.open_source import Source, runs_in_bfloat16
from transmla.source.self_text import sample_self
from transmla.source.text import load_blocks


def check_length(spec: AttentionSpec, length: int) -> None:
    """Check that calibration sequences of ``length`` tokens fit the source's context.

    With longrope, sequences must also be short enough to use the short frequencies, because layers are converted with
    these.

    Raises:
        TransmlaError: if the sequences are too long.
    """
    short = min((kind.short_length for kind in spec.kinds if kind.short_length is not None), default=length)
    if length > short:
        raise TransmlaError(
            f"calibration sequences of {length} tokens are longer than {short}",
            limit=f"longrope uses its short frequencies up to {short} tokens, and layers are converted with these",
            remedy="lower --calibration-length",
        )
    if length > spec.max_position_embeddings:
        raise TransmlaError(
            f"calibration sequences of {length} tokens are longer than the source's context",
            limit=f"at most {spec.max_position_embeddings}",
            remedy="lower --calibration-length",
        )


def calibration_tokens(recipe: Recipe, source: Source, tokenizer: Any, report: Reporter) -> Tensor:
    """Load or sample the calibration tokens of a recipe.

    Args:
        recipe: the recipe, whose ``calibration`` names a text, or ``self`` to sample from the source.
        source: the opened source.
        tokenizer: the source's tokenizer.
        report: receives the progress of sampling.

    Returns:
        Token ids [sequences, length].

    Raises:
        TransmlaError: if the tokenizer produces tokens outside the model's vocabulary.
    """
    calibration = recipe.calibration
    if calibration.source != "self":
        blocks = load_blocks(
            calibration.source,
            tokenizer,
            sequences=calibration.sequences,
            length=calibration.length,
            split=calibration.split,
            column=calibration.column,
        )
        if int(blocks.max()) >= source.spec.vocab_size:
            raise TransmlaError(
                f"the tokenizer produces token {int(blocks.max())}",
                limit=f"the model's vocabulary has {source.spec.vocab_size}",
                remedy="use the tokenizer that belongs to this model",
            )
        return blocks
    device = pick_device(recipe.device)
    dtype = torch.bfloat16 if runs_in_bfloat16(source, device) else torch.float32
    report.stage("sampling calibration text", calibration.sequences)
    model = load_model(source.path, dtype=dtype).to(device)
    return sample_self(
        model,
        tokenizer,
        sequences=calibration.sequences,
        length=calibration.length,
        seed=recipe.seed,
        progress=lambda done, _: report.advance(done),
    )
