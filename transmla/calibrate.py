"""Running one source layer over the calibration stream, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from transmla.artifacts import AttentionSpec, LayerStats, LayerWeights
from transmla.core.absorb import causal_softmax, source_scores
from transmla.native import RMS_NORM_EPS

# Sequences whose attention is measured for the calibrated phase, and the share of each window whose
# queries count: the first quarter sees too few distances.
PHASE_SEQUENCES = 8
PHASE_SKIP = 4
TOKENS_PER_STEP = 4096


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

    def __init__(
        self, skeleton: Any, config: Any, spec: AttentionSpec, device: torch.device, *, half: bool = False
    ) -> None:
        self.spec, self.device, self.half = spec, device, half
        self.module: nn.Module = skeleton.model.layers[0]
        self.rotary = type(skeleton.model.rotary_emb)(config).to(device)
        self.inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32, device=device)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over the tensors of one layer, keyed relative to it."""
        dtype = torch.bfloat16 if self.half else torch.float32
        placed = {name: tensor.to(self.device, dtype) for name, tensor in tensors.items()}
        self.module.load_state_dict(placed, strict=True, assign=True)

    def weights(self) -> LayerWeights:
        """The attention weights by head, float32."""
        spec, attention = self.spec, self.module.self_attn
        d, width = spec.head_dim, spec.hidden_size
        q, k, v, o = (getattr(attention, f"{name}_proj").weight.detach().float() for name in "qkvo")
        return LayerWeights(
            q.view(spec.num_attention_heads, d, width),
            k.view(spec.num_key_value_heads, d, width),
            v.view(spec.num_key_value_heads, d, width),
            o.view(width, spec.num_attention_heads, d).transpose(0, 1),
        )

    @torch.no_grad()
    def attention_input(self, hidden: Tensor) -> Tensor:
        """The normalised input of the attention, [N, T, D] → [N, T, D]."""
        return self.module.input_layernorm(hidden.to(self.device))

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """The layer's output for ``hidden`` [N, T, D]."""
        positions = torch.arange(hidden.shape[1], device=self.device)[None]
        embeddings = self.rotary(hidden, positions)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            output = self.module(
                hidden, attention_mask=None, position_ids=positions, position_embeddings=embeddings
            )
        return output[0] if isinstance(output, tuple) else output

    def observe(self, stream: Tensor) -> Observations:
        """Run the layer over ``stream`` [N, T, D] step by step; returns what was seen and the next stream."""
        width = self.spec.hidden_size
        moment = torch.zeros(width, width, dtype=torch.float64, device=self.device)
        norms = [NormRatio(self.spec.rms_norm_eps) for _ in range(2)]
        hooks = [
            module.register_forward_pre_hook(lambda _, args, norm=norm: norm.add(args[0]))
            for module, norm in zip(
                (self.module.input_layernorm, self.module.post_attention_layernorm), norms, strict=True
            )
        ]
        mass = torch.zeros(self.spec.num_attention_heads, stream.shape[1], dtype=torch.float64, device=self.device)
        following = torch.empty_like(stream)
        try:
            for start, hidden in steps(stream):
                x = self.attention_input(hidden)
                flat = x.flatten(0, 1)
                moment += (flat.mT @ flat).double()
                if start < PHASE_SEQUENCES:
                    mass += self._distance_mass(x[: PHASE_SEQUENCES - start])
                following[start : start + len(hidden)] = self.forward(hidden.to(self.device)).to(stream.device)
        finally:
            for hook in hooks:
                hook.remove()
        tokens = stream.shape[0] * stream.shape[1]
        total = mass.sum(-1, keepdim=True)
        stats = LayerStats(moment / tokens, mass / total.clamp_min(torch.finfo(mass.dtype).tiny), tokens)
        return Observations(stats, norms[0], norms[1], following)

    def _distance_mass(self, x: Tensor) -> Tensor:
        """Attention mass [H, T] by distance, the sink token and early queries left out."""
        length = x.shape[1]
        first = length // PHASE_SKIP
        weights = self.weights()
        total = x.new_zeros(self.spec.num_attention_heads, length - first, length)
        for sequence in x:
            scores = source_scores(
                sequence[None],
                weights,
                self.inv_freq,
                scaling=self.spec.scaling,
                gain=self.spec.attention_factor**2,
            )
            total += causal_softmax(scores)[0, :, first:]
        total[..., 0] = 0
        return sum_by_distance(total, first)


def sum_by_distance(attention: Tensor, first: int) -> Tensor:
    """Σ over i − j = Δ of ``attention`` [H, R, T], whose rows are the queries i = first … T − 1; [H, T] float64."""
    heads, rows, length = attention.shape
    # Reversed columns, each row shifted one further: equal distances then stand in one column.
    padded = torch.nn.functional.pad(attention.flip(-1), (0, rows)).flatten(1)[:, :-rows]
    by_column = padded.view(heads, rows, length + rows - 1).sum(1, dtype=torch.float64)
    return by_column[:, length - 1 - first :]


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
