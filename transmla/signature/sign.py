"""Make the signature of an export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from transmla.boundary import read_json_object
from transmla.export.hashes import file_sha256
from transmla.export.signature import LayerSignature, Signature
from transmla.export.travel import KEY as RECORD
from transmla.families.base import Family
from transmla.guard.headers import read_headers, shards_of
from transmla.registry import lookup
from transmla.reporter import Reporter, Silent
from transmla.signature.layers import LayerByLayer, LayerProjections, RestProjections
from transmla.signature.tokenizer import describe_tokenizer
from transmla.source.checkpoint import open_checkpoint
from transmla.source.describe import empty_model
from transmla.source.load import load_config, load_tokenizer
from transmla.source.open_source import Source

# Fields of a signature that a healing does not change, and all fields that ``contents`` returns.
FILES = ("config", "generation", "tokenizer", "code")
CONTENTS = (*FILES, "dtypes")


@dataclass(frozen=True)
class Measured:
    """Projections of a whole model: of each layer, and of the rest."""

    layers: list[LayerProjections]
    rest: RestProjections


def measure_export(
    folder: Path,
    family: str,
    device: torch.device | str,
    reporter: Reporter | None = None,
    *,
    rounded: bool = False,
) -> Measured:
    """Run an export one layer at a time on seeded inputs.

    Args:
        folder: folder of the export.
        family: name of the source's family.
        device: the device that runs the layers, in float64 if it can.
        reporter: receives the progress, in layers; None: no reports.
        rounded: whether to measure how much bfloat16 changes the logits.
    """
    named: Family = lookup("transmla.families", "FAMILY", family, kind="model family")
    run = LayerByLayer(empty_model(load_config(folder)), open_checkpoint(folder), named, device, rounded=rounded)
    return Measured(_reported("signing the export", run, reporter), run.rest())


def measure_source(
    source: Source, device: torch.device | str, reporter: Reporter | None = None
) -> list[LayerProjections]:
    """Run a source one layer at a time on the same inputs; ``reporter`` receives the progress."""
    run = LayerByLayer(source.model, source.checkpoint, source.family, device)
    return _reported("signing the source", run, reporter)


def _reported(stage: str, run: LayerByLayer, reporter: Reporter | None) -> list[LayerProjections]:
    report, measured = reporter or Silent(), list[LayerProjections]()
    report.stage(stage, run.count)
    for layer in run.layers():
        measured.append(layer)
        report.advance(len(measured))
    return measured


def sign(
    folder: Path,
    family: str,
    device: torch.device | str,
    *,
    source: Source | None = None,
    before: Signature | None = None,
    healings: int = 0,
    reporter: Reporter | None = None,
) -> Signature:
    """Return the signature of the export in ``folder``, whose weights, config, tokenizer and code are written.

    Args:
        folder: folder of the export.
        family: name of the source's family.
        device: the device that runs the layers, in float64 if it can.
        source: the source, to sign it too.
        before: signature before a healing. A healing changes weights only, so all else is taken from there.
        healings: number of healings of the export.
        reporter: receives the progress, in layers; None: no reports.
    """
    measured = measure_export(folder, family, device, reporter, rounded=True)
    signature = Signature(
        layers=recorded(measured.layers),
        embedding=measured.rest.embedding.rounded(),
        head=measured.rest.head.rounded(),
        logits=measured.rest.logits.rounded(),
        rounding=[float(f"{value:.3g}") for value in measured.rest.rounding],
        **contents(folder),
        healings=healings,
        source=[] if source is None else recorded(measure_source(source, device, reporter)),
    )
    if before is None:
        return signature
    return replace(signature, **{name: getattr(before, name) for name in (*FILES, "source")})


def contents(folder: Path) -> dict[str, Any]:
    """Return what a signature records of an export besides what it computes, by the names in ``CONTENTS``."""
    code = {file.name: file_sha256(file) for file in sorted(folder.glob("*.py"))}
    config, generation = (read_json_object(folder / name) or {} for name in ("config.json", "generation_config.json"))
    config.pop(RECORD, None)  # written after the signature, which it contains
    dtypes = Counter(tensor.dtype for tensor in read_headers(folder, shards_of(folder)).values())
    values = config, generation, describe_tokenizer(load_tokenizer(folder)), code, dict(sorted(dtypes.items()))
    return dict(zip(CONTENTS, values, strict=True))


def recorded(layers: Iterable[LayerProjections]) -> list[LayerSignature]:
    """Return projections as the manifest records them."""
    return [LayerSignature(layer.attention.rounded(), layer.change.rounded()) for layer in layers]
