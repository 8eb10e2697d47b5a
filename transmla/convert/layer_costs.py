"""Measure in one pass what each layer and each size of the cache costs on held-out text.

Beside the source's hidden states, two kinds of hidden states run through the source's layers:

- one for each size, in whose path all layers are converted at this size;
- one for each layer, in whose path this layer alone is converted, at a middle size.

Their KL to the source is measured after the last layer. The KL of a layer at another size is that at the middle size,
times the ratio of the errors that the layer itself makes. Only one layer has its weights in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors, Plan
from transmla.convert.factorize import factorize
from transmla.convert.finite import check_hidden, check_numbers, decompositions
from transmla.convert.held_rows import Rows
from transmla.convert.observe import observe
from transmla.convert.prepare import Prepared
from transmla.convert.source_layer import SourceLayer, steps
from transmla.convert.streams import mapped
from transmla.reporter import Reporter
from transmla.source.checkpoint import check_finite
from transmla.source.decoder_layer import embedded
from transmla.source.open_source import runs_in_bfloat16
from transmla.source.output_head import OutputHead

# Tokens of the rows that run through every variant. Of these rows there is one for every ROWS_PER times as many
# calibration tokens, within limits: for 30 layers and 10 sizes, they cost about as much as one more pass over the text.
VARIANT_LENGTH, ROWS_PER, FEWEST_ROWS, MOST_ROWS = 256, 12, 4, 12
# Smallest divisor of an error, and smallest KL: rounding makes that of equal models negative.
TINY = 1e-9


@dataclass(frozen=True)
class Costs:
    """What sizes cost on held-out text, in nats per token.

    Attributes:
        totals: KL to the source if all layers have a size, for each size.
        layers: KL to the source if one layer alone is converted, for each size, by index of the layer; empty if only
            the totals were measured.
    """

    totals: tuple[float, ...]
    layers: dict[int, tuple[float, ...]]


def measure_costs(
    prepared: Prepared,
    plans: Sequence[Plan],
    rows: Rows,
    report: Reporter,
    *,
    by_layer: bool,
    folder: Path | None = None,
) -> Costs:
    """Run the source once, and measure the closed form's cost of every size.

    Args:
        prepared: the conversion.
        plans: plans of the sizes, with falling cache.
        rows: the text; ``calibration`` and ``choosing`` are read.
        report: receives the progress.
        by_layer: whether to measure single layers as well.
        folder: folder on the disk for the hidden states of the calibration text; None keeps them in memory.

    Raises:
        TransmlaError: if a number overflows.
    """
    source, names = prepared.source, prepared.source.family.tensors
    layer = SourceLayer(
        source.model,
        source.family,
        source.spec,
        prepared.device,
        half=runs_in_bfloat16(source, prepared.device),
        folder=folder,
    )
    embedding = source.checkpoint.read(names["embed"])
    check_finite(names["embed"], embedding)
    into = None if folder is None else mapped((*rows.calibration.shape, embedding.shape[1]), folder)
    stream = embedded(source.model, rows.calibration, embedding, into=into)
    exact = embedded(source.model, variant_rows(rows), embedding).to(prepared.device)
    del embedding
    sizes, single = [exact] * len(plans), dict[int, Tensor]()
    errors, middle = dict[int, list[float]](), len(plans) // 2
    count = source.spec.num_hidden_layers
    report.stage("measuring what each size costs", count)
    for i in range(count):
        layer.load(source.checkpoint.layer(names["layer"].format(i=i)), i)
        if i in prepared.plan.kept:
            factors: list[LayerFactors | None] = [None] * len(plans)
            stream = layer.run_stream(stream, None)[1]
        else:
            with decompositions(layer.place):
                observations = observe(layer, stream)
                weights, stats = layer.weights().to(torch.float64), observations.stats
                factors = [factorize(weights, stats, plan.at(i)).to(torch.float32) for plan in plans]
            stream = observations.hidden
        single = {k: run(layer, hidden) for k, hidden in single.items()}
        if by_layer and i not in prepared.plan.kept:
            errors[i] = _errors(layer, exact, factors)
            check_numbers(layer.place, {f"the error at size {k}": error for k, error in enumerate(errors[i])})
            single[i] = run(layer, exact, factors[middle])
        sizes = [run(layer, hidden, f) for hidden, f in zip(sizes, factors, strict=True)]
        exact = run(layer, exact)
        check_hidden(layer.place, {"source": exact} | {f"size {k}": hidden for k, hidden in enumerate(sizes)})
        report.advance(i + 1)
    head = OutputHead(source.model, source.checkpoint, source.family, prepared.device)
    report.stage("comparing with the source", 1)
    found = [max(TINY, kl) for kl in head.divergences(exact, [*sizes, *single.values()])]
    report.advance(1)
    totals, alone = found[: len(sizes)], dict(zip(single, found[len(sizes) :], strict=True))
    layers = {i: tuple(alone[i] * error / max(errors[i][middle], TINY) for error in errors[i]) for i in alone}
    return Costs(tuple(totals), layers)


def variant_rows(rows: Rows) -> Tensor:
    """Return the token ids [n, t] that run through every variant."""
    count = rows.calibration.numel() // (ROWS_PER * VARIANT_LENGTH)
    return rows.choosing[: min(MOST_ROWS, max(FEWEST_ROWS, count)), :VARIANT_LENGTH]


@torch.no_grad()
def run(layer: SourceLayer, hidden: Tensor, factors: LayerFactors | None = None) -> Tensor:
    """Return hidden states [N, T, D] after a layer, a few sequences at a time; None runs the source's attention."""
    return torch.cat([layer.run(part, factors) for _, part in steps(hidden)])


@torch.no_grad()
def _errors(layer: SourceLayer, hidden: Tensor, sizes: Sequence[LayerFactors | None]) -> list[float]:
    """Return the mean squared error of the attention at each size, in units of each token's mean square."""
    totals = [0.0] * len(sizes)
    for _, part in steps(hidden):
        target = layer.run(part, through_mlp=False)
        weight = target.square().mean(-1, keepdim=True).clamp_min(TINY)
        for k, factors in enumerate(sizes):
            error = (layer.run(part, factors, through_mlp=False) - target).square() / weight
            totals[k] += float(error.mean()) * len(part)
    return [total / len(hidden) for total in totals]
