"""Running one source layer over the calibration stream, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import AttentionSpec, LayerFactors, LayerStats, LayerWeights, ScoreRules
from transmla.core.fused_attention import attended_heads, fused_attention
from transmla.core.reference_attention import causal_softmax, source_scores
from transmla.families.base import Family
from transmla.source.attention_view import AttentionView, Heads, halves_order
from transmla.source.decoder_layer import attention_input, layer_with, run_layer

# Every QUERY_STRIDE-th query is asked where it looks; those in the first quarter of a window see too few
# distances to count for the phase.
QUERY_STRIDE = 4
DISTANCE_SKIP = 4
TOKENS_PER_STEP = 4096
# Scores held at once while attention is measured.
SCORES_PER_STEP = 2**24


@dataclass
class NormRatio:
    """Running mean and spread of sqrt((m + target_eps)/(m + eps)) over tokens, m = mean(x²)."""

    eps: float
    target_eps: float
    total: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, x: Tensor) -> None:
        mean_square = x.square().mean(-1).double()
        ratio = ((mean_square + self.target_eps) / (mean_square + self.eps)).sqrt()
        self.total += float(ratio.sum())
        self.squares += float(ratio.square().sum())
        self.count += ratio.numel()

    @property
    def correction(self) -> float:
        """Factor for the norm's weight."""
        return self.total / self.count

    @property
    def residual(self) -> float:
        """Root mean square relative error left after the correction."""
        return max(self.squares / self.count - self.correction**2, 0.0) ** 0.5 / self.correction


@dataclass
class Observations:
    """Everything one pass over a layer measured."""

    stats: LayerStats
    input_norm: NormRatio
    output_norm: NormRatio
    hidden: Tensor = field(repr=False)


class SourceLayer:
    """One decoder layer of the source, any one at a time, its attention input observable.

    The hidden stream is float32 always. ``half`` multiplies in bfloat16, for a source stored in it.
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
    ) -> None:
        """``model`` is the source's without weights; ``norm_eps`` the eps of the export's norms, if it is another."""
        self.norm_eps = norm_eps
        self.model, self.family, self.source_spec = model, family, spec
        self.device, self.half = device, half

    def load(self, tensors: dict[str, Tensor], index: int) -> None:
        """Become layer ``index``, of these tensors, keyed relative to it.

        Raises:
            TransmlaError: if they are not the layer's.
        """
        dtype = torch.bfloat16 if self.half else torch.float32
        placed = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self.module: Any = layer_with(self.model, index, placed, dtype).to(self.device)
        for norm in self.module.modules():
            if isinstance(norm, torch.nn.LayerNorm):
                # Unlike families' own norms it takes no stream that is more precise than its weights.
                norm.float()
        self.spec, kind = self.source_spec.at(index), self.source_spec.kind(index)
        self.inv_freq = torch.tensor(kind.inv_freq, dtype=torch.float32, device=self.device)
        attention, spec = self.module.self_attn, self.spec
        order = halves_order(spec.head_dim, 2 * kind.turned, interleaved=self.family.interleaved)
        rules = ScoreRules(kind.window, kind.softcap, getattr(attention, "sinks", None))
        counts = spec.num_attention_heads, spec.num_key_value_heads
        heads = Heads(*counts, spec.head_dim, order, 2 * kind.turned, kind.turned_factor)
        self.view = AttentionView(attention, heads, rules)

    def weights(self) -> LayerWeights:
        """The attention weights by head, float32, as maps of ``features``."""
        return self.view.weights()

    @torch.no_grad()
    def features(self, hidden: Tensor) -> Tensor:
        """What the attention's weights read, [N, T, D] → [N, T, F]."""
        return self._features(attention_input(self.module, hidden.to(self.device)))

    def run(self, hidden: Tensor, factors: LayerFactors | None = None, *, through_mlp: bool = True) -> Tensor:
        """The layer's output with the source's attention or ``factors``; [N, T, D] → [N, T, D].

        Without ``through_mlp``, the stream after the attention.
        """
        attend = partial(self._attend, factors=factors)
        with self._precision():
            return run_layer(self.module, hidden, attend, until=None if through_mlp else self.family.after_attention)

    def _attend(self, x: Tensor, factors: LayerFactors | None) -> Tensor:
        features, output = self._features(x), self.module.self_attn.o_proj
        if factors is not None:
            mixed = fused_attention(features, factors)
            return mixed if output.bias is None else mixed + output.bias
        spec, (q, k, v) = self.spec, self.view.heads_of(features)
        gain = spec.attention_factor**2
        mixed = attended_heads(q, k, v, self.inv_freq, scaling=spec.scaling, gain=gain, rules=self.view.rules)
        return output(mixed)  # type: ignore[no-any-return]

    def _features(self, x: Tensor) -> Tensor:
        with self._precision():
            return self.view.features(x).to(x.dtype)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    @torch.no_grad()
    def observe(self, stream: Tensor) -> Observations:
        """Run the layer over ``stream`` [N, T, D] step by step; returns what was seen and the next stream."""
        width, length = self.view.width, stream.shape[1]
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
        moment, attended = zeros(width, width), zeros(width, width)
        mass, received = zeros(self.spec.num_attention_heads, length), 0.0
        following = torch.empty_like(stream)
        with self._observed_norms() as norms:
            for start, hidden in steps(stream):
                x = self.features(hidden)
                step_mass, squared = self._attention(x)
                mass += step_mass
                received += float(squared.sum())
                flat = x.flatten(0, 1)
                moment += (flat.mT @ flat).double()
                attended += ((x * squared[..., None]).flatten(0, 1).mT @ flat).double()
                following[start : start + len(hidden)] = self.run(hidden.to(self.device)).to(stream.device)
        tokens = stream.shape[0] * length
        total = mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
        stats = LayerStats(moment / tokens, attended / received, mass / total, tokens)
        return Observations(stats, *norms, following)

    @torch.no_grad()
    def run_stream(self, stream: Tensor, factors: LayerFactors | None) -> tuple[Tensor, Tensor]:
        """Run the layer over ``stream`` [N, T, D] with ``factors``, or the source's weights, for its attention.

        Returns E[x xᵀ] [F, F] of the attention's features, and the next stream.
        """
        width = self.view.width
        moment = torch.zeros(width, width, dtype=torch.float64, device=self.device)
        following = torch.empty_like(stream)
        for start, hidden in steps(stream):
            x = self.features(hidden).flatten(0, 1)
            moment += (x.mT @ x).double()
            output = self.run(hidden.to(self.device), factors)
            following[start : start + len(hidden)] = output.to(stream.device)
        return moment / (stream.shape[0] * stream.shape[1]), following

    @contextmanager
    def _observed_norms(self) -> Iterator[tuple[NormRatio, NormRatio]]:
        """Measure what enters the layer's two norms while it runs, where their eps will be another."""
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

    @torch.no_grad()
    def _attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of ``x`` [N, T, D]: mass by distance [H, T], and Σ a² received by every token [N, T].

        The mass leaves out the sink token and early queries.
        """
        spec, length = self.spec, x.shape[1]
        weights, group = self.weights(), self.spec.group_size
        stride = min(QUERY_STRIDE, length)
        queries = torch.arange(stride - 1, length, stride, device=x.device)
        late = len(queries) // DISTANCE_SKIP
        mass = torch.zeros(spec.num_attention_heads, length, dtype=torch.float64, device=x.device)
        squared = torch.zeros(x.shape[:2], device=x.device)
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
        return mass, squared


def sum_by_distance(attention: Tensor, first: int, stride: int = 1) -> Tensor:
    """Σ over i − j = Δ of ``attention`` [H, R, T], whose rows are the queries i = first, first + stride, …

    Returns [H, T] in float64.
    """
    heads, rows, length = attention.shape
    # Reversed columns, each row shifted ``stride`` further: equal distances then stand in one column.
    shift = rows * stride
    skewed = torch.nn.functional.pad(attention.flip(-1), (0, shift)).flatten(1)[:, :-shift]
    by_column = skewed.view(heads, rows, length + shift - stride).sum(1, dtype=torch.float64)
    by_distance = by_column[:, length - 1 - first :][:, :length]
    return torch.nn.functional.pad(by_distance, (0, length - by_distance.shape[1]))


def steps(stream: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Consecutive groups of sequences of ``stream`` [N, T, ...], about TOKENS_PER_STEP tokens each."""
    size = max(1, TOKENS_PER_STEP // stream.shape[1])
    for start in range(0, len(stream), size):
        yield start, stream[start : start + size]
