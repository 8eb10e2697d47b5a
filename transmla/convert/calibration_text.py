"""Read or sample the calibration text of a conversion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import AttentionSpec
from transmla.errors import TransmlaError
from transmla.recipe import Recipe
from transmla.reporter import Reporter
from transmla.source.device import pick_device
from transmla.source.load import load_model
from transmla.source.memory import free_memory
from transmla.source.mixture import Part, beginnings, interleave, openings, parts_of, read_rows
from transmla.source.open_source import Source, runs_in_bfloat16
from transmla.source.samples import sampled_rows
from transmla.source.text import SELF

# Share of the free memory, and of a GPU's whole memory, that a source's weights may take to be sampled. On a GPU, the
# caches of the samples take most of the rest (``SAMPLING_SHARE``).
MEMORY_SHARE, GPU_SHARE = 0.9, 0.5


def longest_sequence(spec: AttentionSpec) -> int:
    """Return the tokens of the longest calibration sequence that ``check_length`` accepts."""
    return min(spec.max_position_embeddings, _short_length(spec) or spec.max_position_embeddings)


def _short_length(spec: AttentionSpec) -> int | None:
    """Return the tokens up to which longrope uses its short frequencies; None without longrope."""
    return min((kind.short_length for kind in spec.kinds if kind.short_length is not None), default=None)


def check_length(spec: AttentionSpec, length: int) -> None:
    """Check that calibration sequences of ``length`` tokens fit the source's context.

    With longrope, sequences must also be short enough to use the short frequencies, because layers are converted with
    these.

    Raises:
        TransmlaError: if the sequences are too long.
    """
    short = _short_length(spec)
    if short is not None and length > short:
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


@dataclass(frozen=True)
class CalibrationText:
    """The texts of one conversion, before samples of the model are drawn.

    Attributes:
        parts: the mixture.
        texts: token ids [rows, length] of every part but ``self``, by name.
        sequences: rows of the whole mixture.
        length: tokens in a row.
    """

    parts: tuple[Part, ...]
    texts: dict[str, Tensor]
    sequences: int
    length: int

    @property
    def sampled(self) -> int:
        """Number of rows that are sampled from the model."""
        return self.sequences - sum(len(rows) for rows in self.texts.values())

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the rows by name of the text; texts without a row are missing."""
        rows = {name: len(tokens) for name, tokens in self.texts.items()} | {SELF: self.sampled}
        return {part.name: rows[part.name] / self.sequences for part in self.parts if rows.get(part.name)}


def why_unsampled(source: Source, device: torch.device) -> str:
    """Return why ``source`` cannot be sampled on ``device``; empty if it can.

    Its weights are loaded into the computer's memory, and then moved to the device.
    """
    weights = sum(math.prod(shape) for shape in source.checkpoint.shapes.values())
    needed = weights * (2 if runs_in_bfloat16(source, device) else 4)
    limits = {"of free memory": MEMORY_SHARE * free_memory()}
    if device.type == "cuda":
        limits["of the GPU's memory"] = GPU_SHARE * torch.cuda.get_device_properties(device).total_memory
    name, limit = min(limits.items(), key=lambda item: item[1])
    if needed <= limit:
        return ""
    return f"the weights take {needed / 1e9:.0f} GB, and sampling may use {limit / 1e9:.0f} GB {name} for them"


def read_calibration(recipe: Recipe, source: Source, tokenizer: Any, report: Reporter) -> CalibrationText:
    """Read the texts of a recipe's calibration, before a weight is loaded.

    Args:
        recipe: the recipe, with ``sequences`` and ``length`` resolved.
        source: the opened source.
        tokenizer: the source's tokenizer.
        report: receives the progress.

    Raises:
        TransmlaError: if a text cannot be read, is too short for its share, or does not fit the tokenizer or the model;
            or if ``self`` is named, and the memory does not hold the source.
    """
    calibration = recipe.calibration
    sequences, length = calibration.sequences, calibration.length
    assert sequences is not None
    assert length is not None
    unsampled = why_unsampled(source, pick_device(recipe.device))
    options: dict[str, Any] = {"split": calibration.split, "column": calibration.column, "unsampled": unsampled}
    parts = parts_of(calibration.source, tokenizer, report=report, rows=sequences, **options)
    texts = read_rows(parts, tokenizer, sequences=sequences, length=length, vocabulary=source.spec.vocab_size)
    return CalibrationText(parts, texts, sequences, length)


def calibration_tokens(
    recipe: Recipe,
    source: Source,
    tokenizer: Any,
    calibration: CalibrationText,
    fingerprint: str,
    report: Reporter,
    *,
    pool: int = 0,
) -> Tensor:
    """Return the calibration tokens; samples of the source are drawn if the mixture holds ``self``.

    Args:
        recipe: the recipe of the conversion.
        source: the opened source.
        tokenizer: the source's tokenizer.
        calibration: the texts.
        fingerprint: hash of the source's weights.
        report: receives the progress of sampling.
        pool: tokens to sample at least, for a healing that follows.

    Returns:
        Token ids [sequences, length]. Every run of rows holds the parts in nearly their shares.
    """
    texts = dict(calibration.texts)
    if calibration.sampled:
        device = pick_device(recipe.device)
        dtype = torch.bfloat16 if runs_in_bfloat16(source, device) else torch.float32
        begin = openings(beginnings(calibration.parts, tokenizer), tokenizer, seed=recipe.seed)
        model = load_model(source.path, dtype=dtype, allow_pickle=recipe.allow_pickle).to(device)
        texts[SELF] = sampled_rows(
            model,
            tokenizer,
            begin,
            rows=calibration.sampled,
            length=calibration.length,
            seed=recipe.seed,
            fingerprint=fingerprint,
            report=report,
            pool=pool,
        )
    return interleave(calibration.parts, texts, calibration.sequences)
