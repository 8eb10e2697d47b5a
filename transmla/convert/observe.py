"""Measure a source layer's statistics while it runs over the calibration hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from transmla.artifacts import LayerStats
from transmla.convert.eps_correction import NormRatio
from transmla.convert.finite import check_hidden, check_tensors, watched_norms
from transmla.convert.sensitivity_meter import SensitivityMeter
from transmla.convert.source_layer import SourceLayer, steps
from transmla.convert.streams import empty_like
from transmla.core.reference_attention import causal_softmax, source_scores

# Attention is measured for every QUERY_STRIDE-th query, and for fewer of a sequence that still has QUERIES of them.
QUERY_STRIDE, QUERIES = 4, 512
# The first 1/DISTANCE_SKIP of the queries are left out of ``distance_mass``: few distances are possible for them.
DISTANCE_SKIP = 4
# Largest number of scores in memory at once while attention is measured.
SCORES_PER_STEP = 2**24


@dataclass
class Observations:
    """Measurements of one pass of a layer over the calibration text.

    Attributes:
        stats: statistics of the attention's input and of its attention weights.
        input_norm: ratios of the norm before the attention.
        output_norm: ratios of the norm before the MLP.
        hidden: hidden states [N, T, D] after the layer.
    """

    stats: LayerStats
    input_norm: NormRatio
    output_norm: NormRatio
    hidden: Tensor = field(repr=False)


@torch.no_grad()
def observe(layer: SourceLayer, stream: Tensor) -> Observations:
    """Run the source's ``layer`` over hidden states ``stream`` [N, T, D], and measure its statistics.

    Raises:
        TransmlaError: if the hidden states, the input of a norm, or the statistics overflow.
    """
    width, length = layer.view.width, stream.shape[1]
    zeros = partial(torch.zeros, dtype=torch.float64, device=layer.device)
    moment, attended = zeros(width, width), zeros(width, width)
    mass, received = zeros(layer.spec.num_attention_heads, length), zeros(())
    meter = SensitivityMeter(layer.weights(), width, length) if layer.view.normed else None
    following = empty_like(stream, layer.device, layer.folder)
    watched = watched_norms(layer.place, layer.module, layer.ranks, layer.device)
    with _observed_norms(layer) as norms, watched:
        for start, part in steps(stream, layer.ranks):
            hidden = part.to(layer.device)
            x = layer.features(hidden)
            step_mass, squared = _attention(layer, x, meter)
            mass += step_mass
            received += squared.sum()
            flat = x.flatten(0, 1)
            moment += layer.moment(flat)
            attended += layer.moment(flat, squared.flatten())
            following[start : start + len(hidden)].copy_(layer.run(hidden))
    layer.ranks.add_up(moment, attended, mass, received)
    layer.ranks.complete(following, layer.device)
    tokens = stream.shape[0] * length
    total = mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    check_hidden(layer.place, {"source": following})
    sensitivity = None if meter is None else meter.result(layer.ranks)
    stats = LayerStats(moment / tokens, attended / received, mass / total, tokens, sensitivity=sensitivity)
    measured = {**vars(stats), **({} if sensitivity is None else vars(sensitivity))}
    check_tensors(layer.place, {name: value for name, value in measured.items() if isinstance(value, Tensor)})
    return Observations(stats, *norms, following)


@contextmanager
def _observed_norms(layer: SourceLayer) -> Iterator[tuple[NormRatio, NormRatio]]:
    """Measure the inputs of the layer's two norms during the context, if the export's eps differs."""
    eps = layer.spec.rms_norm_eps
    norms = NormRatio(eps, layer.norm_eps or eps), NormRatio(eps, layer.norm_eps or eps)
    names = () if layer.norm_eps is None else ("input_layernorm", "post_attention_layernorm")
    hooks = [
        layer.module.get_submodule(name).register_forward_pre_hook(lambda _, args, norm=norm: norm.add(args[0]))
        for name, norm in zip(names, norms, strict=False)
    ]
    try:
        yield norms
    finally:
        for hook in hooks:
            hook.remove()
    for norm in norms:
        norm.add_up(layer.ranks, layer.device)


@torch.no_grad()
def _attention(layer: SourceLayer, x: Tensor, meter: SensitivityMeter | None) -> tuple[Tensor, Tensor]:
    """Measure the attention weights a for features ``x`` [N, T, F]; ``meter`` measures the sensitivity as well.

    Returns:
        The attention mass by distance [H, T], without the sink token and early queries; and Σ a² over heads and
        queries for every token [N, T].
    """
    spec, length = layer.spec, x.shape[1]
    weights, group = layer.weights(), layer.spec.group_size
    stride = min(max(QUERY_STRIDE, length // QUERIES), length)
    queries = torch.arange(stride - 1, length, stride, device=x.device)
    late = len(queries) // DISTANCE_SKIP
    mass = torch.zeros(spec.num_attention_heads, length, dtype=torch.float64, device=x.device)
    squared = torch.zeros(x.shape[:2], device=x.device)
    energy = None
    if meter is not None:
        with layer.precision():
            energy = layer.source_output(x)[:, queries].float().square().sum(-1)
    per_step = max(1, SCORES_PER_STEP // (group * length * len(queries)))
    for g in range(spec.num_key_value_heads):
        heads = slice(g * group, (g + 1) * group)
        part = replace(weights, q=weights.q[heads], k=weights.k[g : g + 1], rules=weights.rules.heads(heads))
        for start in range(0, len(x), per_step):
            scores = source_scores(
                x[start : start + per_step],
                part,
                layer.inv_freq,
                scaling=spec.scaling,
                gain=spec.attention_factor**2,
                positions=queries,
            )
            attention = causal_softmax(scores, queries, part.rules)
            squared[start : start + per_step] += attention.square().sum((1, 2))
            total = attention[:, :, late:].sum(0)
            total[..., 0] = 0
            mass[heads] += sum_by_distance(total, int(queries[late]), stride)
            if meter is not None and energy is not None:
                part_energy = energy[start : start + per_step]
                influence = meter.add(heads, x[start : start + per_step], queries, attention, part_energy)
                meter.mass[heads] += sum_by_distance(influence[:, late:], int(queries[late]), stride)
    return mass, squared


def sum_by_distance(attention: Tensor, first: int, stride: int = 1) -> Tensor:
    """Sum attention weights over all pairs of query i and key j with equal distance Δ = i − j.

    Args:
        attention: attention weights [H, R, T]; row r is the query at position first + r·stride.
        first: position of the first query.
        stride: distance between queries.

    Returns:
        The sums [H, T] by distance Δ, in float64.
    """
    heads, rows, length = attention.shape
    # Reverse the columns and shift each row by ``stride`` more than the row above; equal distances then share a column.
    shift = rows * stride
    skewed = torch.nn.functional.pad(attention.flip(-1), (0, shift)).flatten(1)[:, :-shift]
    by_column = skewed.view(heads, rows, length + shift - stride).sum(1, dtype=torch.float64)
    by_distance = by_column[:, length - 1 - first :][:, :length]
    return torch.nn.functional.pad(by_distance, (0, length - by_distance.shape[1]))
