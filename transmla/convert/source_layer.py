"""Run one source layer over the calibration hidden states, and measure its statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import AttentionSpec, LayerFactors, LayerStats, LayerWeights, ScoreRules
from transmla.convert.eps_correction import NormRatio
from transmla.convert.finite import check_hidden, check_tensors, watched_norms
from transmla.convert.sensitivity_meter import SensitivityMeter
from transmla.convert.streams import empty_like
from transmla.core.fused_attention import attended_heads, fused_attention
from transmla.core.reference_attention import causal_softmax, source_scores
from transmla.families.base import Family
from transmla.ranks import Ranks
from transmla.source.attention_view import AttentionView, Heads, halves_order
from transmla.source.decoder_layer import attention_input, layer_with, run_layer
from transmla.token_split import TokenSplit

# Attention is measured for every QUERY_STRIDE-th query, and for fewer of a sequence that still has QUERIES of them.
QUERY_STRIDE, QUERIES = 4, 512
# The first 1/DISTANCE_SKIP of the queries are left out of ``distance_mass``: few distances are possible for them.
DISTANCE_SKIP = 4
# Approximate number of tokens that a layer processes at once.
TOKENS_PER_STEP = 4096
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


class SourceLayer:
    """A decoder layer of the source, whose weights are loaded by ``load``.

    The layer runs with the source's attention or with MLA factors. Its hidden states are always float32.

    Attributes:
        module: transformers' decoder layer.
        view: the features and weights of its attention.
        spec: the source's attention at this layer.
        inv_freq: rotary frequencies [p], in radians per position.
        place: the layer in words, for errors.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        spec: AttentionSpec,
        device: torch.device,
        *,
        half: bool = False,
        norm_eps: float | None = None,
        ranks: Ranks | None = None,
        folder: Path | None = None,
    ) -> None:
        """Prepare for layers of one source.

        Args:
            model: the source's model without weights.
            family: the source's family.
            spec: the source's attention.
            device: the device that the layer runs on.
            half: multiply matrices in bfloat16.
            norm_eps: eps of the export's norms; None if the export keeps the source's eps.
            ranks: processes that share the calibration text; each runs the layer over its own sequences. None: one.
            folder: folder for the hidden states after a layer; None keeps them in memory (``streams.empty_like``).
        """
        self.norm_eps, self.folder = norm_eps, folder
        self.ranks = ranks or Ranks()
        self.model, self.family, self.source_spec = model, family, spec
        self.device, self.half = device, half

    def load(self, tensors: dict[str, Tensor], index: int) -> None:
        """Load the weights of layer ``index``.

        Args:
            tensors: the layer's tensors, by name without the layer's prefix.
            index: index of the layer.

        Raises:
            TransmlaError: if ``tensors`` are not exactly the tensors of this layer.
        """
        dtype = torch.bfloat16 if self.half else torch.float32
        # Before there are two layers in memory.
        self.__dict__.pop("module", None)
        self.__dict__.pop("view", None)
        on_device = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self.module: Any = layer_with(self.model, index, on_device, dtype).to(self.device)
        for norm in self.module.modules():
            if isinstance(norm, torch.nn.LayerNorm):
                # Unlike the families' RMSNorms, LayerNorm refuses float32 inputs with bfloat16 weights.
                norm.float()
        self.place = f"layer {index}"
        self.spec, kind = self.source_spec.at(index), self.source_spec.kind(index)
        self.inv_freq = torch.tensor(kind.inv_freq, dtype=torch.float32, device=self.device)
        attention, spec = self.module.self_attn, self.spec
        order = halves_order(spec.head_dim, 2 * kind.rotary_pairs, interleaved=self.family.interleaved)
        rules = ScoreRules(kind.window, kind.softcap, getattr(attention, "sinks", None))
        counts = spec.num_attention_heads, spec.num_key_value_heads
        heads = Heads(*counts, spec.head_dim, order, 2 * kind.rotary_pairs, kind.rotary_factor)
        self.view = AttentionView(attention, heads, rules)

    def weights(self) -> LayerWeights:
        """Return the attention weights by head, float32, as maps of ``features``."""
        return self.view.weights()

    @torch.no_grad()
    def features(self, hidden: Tensor) -> Tensor:
        """Return the features that the attention's weights read, for ``hidden`` states; [N, T, D] → [N, T, F]."""
        return self._features(attention_input(self.module, hidden.to(self.device)))

    def run(
        self,
        hidden: Tensor,
        factors: LayerFactors | None = None,
        *,
        positions: Tensor | None = None,
        through_mlp: bool = True,
        split: TokenSplit | None = None,
    ) -> Tensor:
        """Run the layer; [N, T, D] → [N, T, D].

        Args:
            hidden: hidden states that enter the layer.
            factors: MLA factors for the attention; None runs the source's attention.
            positions: increasing positions [T] of the tokens; None means 0 to T − 1. A layer with a window reads no
                others, because its window counts tokens.
            through_mlp: run the whole layer; otherwise return the hidden states after the attention.
            split: which tokens of a sequence these are, if several processes share its tokens.
        """
        if self.view.rules.window is not None:
            positions = None
        if split is not None and positions is None:
            positions = split.positions(hidden.device)
        attend = partial(self._attend, factors=factors, positions=positions, split=split)
        with self._precision():
            return run_layer(self.module, hidden, attend, until=None if through_mlp else self.family.after_attention)

    def _attend(
        self, x: Tensor, factors: LayerFactors | None, positions: Tensor | None, split: TokenSplit | None
    ) -> Tensor:
        """Return the attention's output for its input ``x``; [N, T, D] → [N, T, D]."""
        features, output = self._features(x), self.module.self_attn.o_proj
        if factors is None:
            return self._output(features, positions, split)
        mixed = fused_attention(features, factors, positions, split, self.view.own)
        return mixed if output.bias is None else mixed + output.bias

    def _output(self, features: Tensor, positions: Tensor | None = None, split: TokenSplit | None = None) -> Tensor:
        """Return the source attention's output for its ``features``; [N, T, F] → [N, T, D]."""
        spec, (q, k, v) = self.spec, self.view.heads_of(features)
        gain = spec.attention_factor**2
        mixed = attended_heads(
            q,
            k,
            v,
            self.inv_freq,
            scaling=spec.scaling,
            gain=gain,
            rules=self.view.rules,
            positions=positions,
            split=split,
        )
        return self.module.self_attn.o_proj(mixed)  # type: ignore[no-any-return]

    def _features(self, x: Tensor) -> Tensor:
        """Return the features of the attention's input ``x``; [N, T, D] → [N, T, F]."""
        with self._precision():
            return self.view.features(x).to(x.dtype)

    def _precision(self) -> torch.autocast:
        """Return a context that multiplies in bfloat16 if ``half`` is set."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    @torch.no_grad()
    def observe(self, stream: Tensor) -> Observations:
        """Run the source's layer over hidden states ``stream`` [N, T, D], and measure its statistics.

        Raises:
            TransmlaError: if the hidden states, the input of a norm, or the statistics overflow.
        """
        width, length = self.view.width, stream.shape[1]
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
        moment, attended = zeros(width, width), zeros(width, width)
        mass, received = zeros(self.spec.num_attention_heads, length), zeros(())
        meter = SensitivityMeter(self.weights(), width, length) if self.view.normed else None
        following = empty_like(stream, self.device, self.folder)
        watched = watched_norms(self.place, self.module, self.ranks, self.device)
        with self._observed_norms() as norms, watched:
            for start, part in steps(stream, self.ranks):
                hidden = part.to(self.device)
                x = self.features(hidden)
                step_mass, squared = self._attention(x, meter)
                mass += step_mass
                received += squared.sum()
                flat = x.flatten(0, 1)
                moment += self.moment(flat)
                attended += self.moment(flat, squared.flatten())
                following[start : start + len(hidden)].copy_(self.run(hidden))
        self.ranks.add_up(moment, attended, mass, received)
        self.ranks.complete(following, self.device)
        tokens = stream.shape[0] * length
        total = mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
        check_hidden(self.place, {"source": following})
        sensitivity = None if meter is None else meter.result(self.ranks)
        stats = LayerStats(moment / tokens, attended / received, mass / total, tokens, sensitivity=sensitivity)
        measured = {**vars(stats), **({} if sensitivity is None else vars(sensitivity))}
        check_tensors(self.place, {name: value for name, value in measured.items() if isinstance(value, Tensor)})
        return Observations(stats, *norms, following)

    @torch.no_grad()
    def run_stream(self, stream: Tensor, factors: LayerFactors | None) -> tuple[Tensor, Tensor]:
        """Run the layer over hidden states, a few sequences at a time.

        Args:
            stream: hidden states [N, T, D] that enter the layer.
            factors: MLA factors for the attention; None runs the source's attention.

        Returns:
            E[x xᵀ] [F, F] of the attention's features, float64, and the hidden states [N, T, D] after the layer.
        """
        width = self.view.width
        moment = torch.zeros(width, width, dtype=torch.float64, device=self.device)
        following = empty_like(stream, self.device, self.folder)
        for start, part in steps(stream, self.ranks):
            hidden = part.to(self.device)
            x = self.features(hidden).flatten(0, 1)
            moment += self.moment(x)
            following[start : start + len(hidden)].copy_(self.run(hidden, factors))
        self.ranks.add_up(moment)
        self.ranks.complete(following, self.device)
        return moment / (stream.shape[0] * stream.shape[1]), following

    def moment(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return Σ weight·x xᵀ [F, F] in float64, for features ``x`` [n, F] and, if not all are 1, weights [n]."""
        with self.fast_products():
            return ((x if weight is None else x * weight[:, None]).mT @ x).double()

    @contextmanager
    def fast_products(self) -> Iterator[None]:
        """Multiply float32 matrices in TF32 during the context, on a GPU that runs the source in bfloat16.

        TF32 is several times as fast as float32, and has three bits more than bfloat16.
        """
        precision = torch.get_float32_matmul_precision()
        if self.half and self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)

    @contextmanager
    def _observed_norms(self) -> Iterator[tuple[NormRatio, NormRatio]]:
        """Measure the inputs of the layer's two norms during the context, if the export's eps differs."""
        eps = self.spec.rms_norm_eps
        norms = NormRatio(eps, self.norm_eps or eps), NormRatio(eps, self.norm_eps or eps)
        names = () if self.norm_eps is None else ("input_layernorm", "post_attention_layernorm")
        hooks = [
            self.module.get_submodule(name).register_forward_pre_hook(lambda _, args, norm=norm: norm.add(args[0]))
            for name, norm in zip(names, norms, strict=False)
        ]
        try:
            yield norms
        finally:
            for hook in hooks:
                hook.remove()
        for norm in norms:
            norm.add_up(self.ranks, self.device)

    @torch.no_grad()
    def _attention(self, x: Tensor, meter: SensitivityMeter | None) -> tuple[Tensor, Tensor]:
        """Measure the attention weights a for features ``x`` [N, T, F]; ``meter`` measures the sensitivity as well.

        Returns:
            The attention mass by distance [H, T], without the sink token and early queries; and Σ a² over heads and
            queries for every token [N, T].
        """
        spec, length = self.spec, x.shape[1]
        weights, group = self.weights(), self.spec.group_size
        stride = min(max(QUERY_STRIDE, length // QUERIES), length)
        queries = torch.arange(stride - 1, length, stride, device=x.device)
        late = len(queries) // DISTANCE_SKIP
        mass = torch.zeros(spec.num_attention_heads, length, dtype=torch.float64, device=x.device)
        squared = torch.zeros(x.shape[:2], device=x.device)
        energy = None
        if meter is not None:
            with self._precision():
                energy = self._output(x)[:, queries].float().square().sum(-1)
        per_step = max(1, SCORES_PER_STEP // (group * length * len(queries)))
        for g in range(spec.num_key_value_heads):
            heads = slice(g * group, (g + 1) * group)
            part = replace(weights, q=weights.q[heads], k=weights.k[g : g + 1], rules=weights.rules.heads(heads))
            for start in range(0, len(x), per_step):
                scores = source_scores(
                    x[start : start + per_step],
                    part,
                    self.inv_freq,
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


def steps(stream: Tensor, ranks: Ranks | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, sequences [n, T, ...]) for consecutive groups of ``stream`` [N, T, ...].

    Each group has about TOKENS_PER_STEP tokens, and at least one sequence. With ``ranks``, the groups are only those of
    this process's share of the sequences.
    """
    size, share = max(1, TOKENS_PER_STEP // stream.shape[1]), (ranks or Ranks()).share(len(stream))
    for start in range(share.start, share.stop, size):
        yield start, stream[start : min(start + size, share.stop)]
