"""The signature of an export: what the export computes and contains, as its manifest records it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerSignature:
    """What one decoder layer computes from seeded inputs, projected onto seeded directions.

    Attributes:
        attention: projections of the attention's output.
        change: projections of the layer's output minus its input.
    """

    attention: list[float]
    change: list[float]


@dataclass(frozen=True)
class Signature:
    """What an export computes and contains.

    File hashes say that files are unchanged. A signature says what they do, so a folder whose hashes were written again
    after a change does not agree with it. ``transmla.signature`` measures and compares signatures.

    Attributes:
        layers: one entry for each decoder layer of the export.
        embedding: projections of the embedding's weight.
        head: projections of the logits that the last norm and the head give for seeded hidden states.
        logits: projections of the whole model's logits for seeded tokens.
        rounding: change of these logits if the model runs in bfloat16, as a fraction of their norm, for each group of
            tokens. Servers run in bfloat16.
        config: content of ``config.json``.
        generation: content of ``generation_config.json``; empty if the export has none.
        tokenizer: what the tokenizer does (``transmla.signature.tokenizer``).
        dtypes: number of tensors of each dtype, by the dtype's name in safetensors.
        code: SHA-256 of the modelling code in hex, by file name.
        healings: number of healings that the export had when it was signed.
        source: one entry for each decoder layer of the source; empty if the source was not at hand.
    """

    layers: list[LayerSignature]
    embedding: list[float]
    head: list[float]
    logits: list[float]
    config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer: dict[str, Any]
    dtypes: dict[str, int]
    code: dict[str, str]
    rounding: list[float] = field(default_factory=list)
    healings: int = 0
    source: list[LayerSignature] = field(default_factory=list)
