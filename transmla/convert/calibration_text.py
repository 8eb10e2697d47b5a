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
    dtype = torch.bfloat16 if runs_in_bfloat16(source, device) else torch.float32
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
