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
from transmla.core.absorb import causal_softmax, source_scores
from transmla.core.fused import attended_heads, fused_attention
from transmla.decoder import attention_input, run_layer
from transmla.frontend import FrontEnd, Heads
from transmla.native import RMS_NORM_EPS

# Every QUERY_STRIDE-th query is asked where it looks; those in the first quarter of a window see too few
# distances to count for the phase.
QUERY_STRIDE = 4
DISTANCE_SKIP = 4
TOKENS_PER_STEP = 4096
# What is given to this module of a layer is the stream after its attention.
AFTER_ATTENTION = "post_attention_layernorm"
# Scores held at once while attention is measured.
SCORES_PER_STEP = 2**24


@dataclass
class NormRatio:
    """Running mean and spread of sqrt((m + eps_target)/(m + eps_source)) over tokens, m = mean(x²)."""

    eps: float
    total: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, x: Tensor) -> None:
        mean_square = x.square().mean(-1).double()
        ratio = ((mean_square + RMS_NORM_EPS) / (mean_square + self.eps)).sqrt()
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
    """One decoder layer of the source, its weights replaceable, its attention input observable.

    The hidden stream is float32 always. ``half`` multiplies in bfloat16, for a source stored in it.
    """

    def __init__(self, skeleton: Any, spec: AttentionSpec, device: torch.device, *, half: bool = False) -> None:
        self.spec, self.device, self.half = spec, device, half
        self.module: Any = skeleton.model.layers[0]
        self.inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32, device=device)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over the tensors of one layer, keyed relative to it."""
        dtype = torch.bfloat16 if self.half else torch.float32
        placed = {name: tensor.to(self.device, dtype) for name, tensor in tensors.items()}
        self.module.load_state_dict(placed, strict=True, assign=True)
        self.module.requires_grad_(False)
        spec = self.spec
        heads = Heads(spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim, tuple(range(spec.head_dim)))
        self.front = FrontEnd(self.module.self_attn, heads, ScoreRules())

    def weights(self) -> LayerWeights:
        """The attention weights by head, float32, as maps of ``features``."""
        return self.front.weights()

    @torch.no_grad()
    def features(self, hidden: Tensor) -> Tensor:
        """What the attention's weights read, [N, T, D] → [N, T, F]."""
        return self.front.features(attention_input(self.module, hidden.to(self.device)))

    def run(self, hidden: Tensor, factors: LayerFactors | None = None, *, through_mlp: bool = True) -> Tensor:
        """The layer's output with the source's attention or ``factors``; [N, T, D] → [N, T, D].

        Without ``through_mlp``, the stream after the attention.
        """
        attend = partial(self._attend, factors=factors)
        with self._precision():
            return run_layer(self.module, hidden, attend, until=None if through_mlp else AFTER_ATTENTION)

    def _attend(self, x: Tensor, factors: LayerFactors | None) -> Tensor:
        features, output = self.front.features(x), self.module.self_attn.o_proj
        if factors is not None:
            mixed = fused_attention(features, factors)
            return mixed if output.bias is None else mixed + output.bias
        spec, (q, k, v) = self.spec, self.front.heads_of(features)
        gain = spec.attention_factor**2
        mixed = attended_heads(q, k, v, self.inv_freq, scaling=spec.scaling, gain=gain, rules=self.front.rules)
        return output(mixed)  # type: ignore[no-any-return]

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    @torch.no_grad()
    def observe(self, stream: Tensor) -> Observations:
        """Run the layer over ``stream`` [N, T, D] step by step; returns what was seen and the next stream."""
        width, length = self.front.width, stream.shape[1]
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
    def follow(self, stream: Tensor, factors: LayerFactors) -> tuple[Tensor, Tensor]:
        """Run the layer over ``stream`` [N, T, D] with ``factors`` for its attention.

        Returns E[x xᵀ] [D, D] of the attention's input, and the next stream.
        """
        width = self.front.width
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
        """Measure what enters the layer's two norms while it runs."""
        norms = NormRatio(self.spec.rms_norm_eps), NormRatio(self.spec.rms_norm_eps)
        modules = self.module.input_layernorm, self.module.post_attention_layernorm
        hooks = [
            module.register_forward_pre_hook(lambda _, args, norm=norm: norm.add(args[0]))
            for module, norm in zip(modules, norms, strict=True)
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


def bfloat16_pays(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return True


def steps(stream: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Consecutive groups of sequences of ``stream`` [N, T, ...], about TOKENS_PER_STEP tokens each."""
    size = max(1, TOKENS_PER_STEP // stream.shape[1])
    for start in range(0, len(stream), size):
        yield start, stream[start : start + size]
