"""A random attention layer with statistics and plans, for the tests of ``transmla.core``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transmla.artifacts import AttentionSpec, LayerFactors, LayerStats, LayerWeights, MLAShape, Plan, RotaryPlan
from transmla.convert.observe import sum_by_distance
from transmla.core.reference_attention import causal_softmax, expanded_attention, source_attention, source_scores

# On matrices this small, a second thread only adds waiting time.
torch.set_num_threads(1)

HIDDEN, WIDTH, LENGTH = 36, 8, 24
# (query heads, key/value heads)
LAYOUTS = {"mha": (4, 4), "gqa": (6, 3), "gqa9": (9, 3), "mqa": (4, 1)}


def make_spec(layout: str, *, attention_factor: float = 1.0) -> AttentionSpec:
    """Return a spec with hidden size ``HIDDEN`` and head width ``WIDTH``."""
    heads, kv_heads = LAYOUTS[layout]
    return AttentionSpec(
        family="llama",
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=WIDTH,
        intermediate_size=32,
        vocab_size=32,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        inv_freq=tuple(100.0 ** (-2 * f / WIDTH) for f in range(WIDTH // 2)),
        attention_factor=attention_factor,
        scaling=WIDTH**-0.5,
        layer_parameters=3 * HIDDEN * 32 + 2 * HIDDEN,
        other_parameters=3 * HIDDEN * 32 + 3 * HIDDEN + 2 * 32 * HIDDEN,
    )


def make_plan(spec: AttentionSpec, method: str, slots: tuple[int, ...], rank: int, freqfold: int = 1) -> Plan:
    """Return a plan with the given rotary slots, which may repeat frequencies."""
    shape = MLAShape(rank, 2 * len(slots), spec.head_dim, spec.head_dim)
    return Plan(spec, shape, RotaryPlan(slots, freqfold), method, "float32", dict(spec.rope_parameters))


def uncut(spec: AttentionSpec, method: str) -> Plan:
    """Return a plan that removes nothing: one slot per frequency and key head, and a latent of full rank."""
    slots = tuple(f for f in range(spec.head_dim // 2) for _ in range(spec.num_key_value_heads))
    return make_plan(spec, method, slots, min(2 * spec.num_key_value_heads * spec.head_dim, spec.hidden_size))


@dataclass(frozen=True)
class Layer:
    """An attention layer: inputs ``x`` [N, T, D], weights, and the statistics of these inputs."""

    spec: AttentionSpec
    x: Tensor
    weights: LayerWeights
    stats: LayerStats

    def source(self) -> Tensor:
        """Return the output [N, T, D] of the source attention."""
        spec = self.spec
        frequencies = torch.tensor(spec.inv_freq, dtype=self.x.dtype)
        gain = spec.attention_factor**2
        return source_attention(self.x, self.weights, frequencies, scaling=spec.scaling, gain=gain)

    def error(self, factors: LayerFactors) -> float:
        """Return ‖MLA − source‖/‖source‖ of the attention's output."""
        return relative(expanded_attention(self.x, factors), self.source())


def second_moment(x: Tensor) -> Tensor:
    """Return E[x xᵀ] [D, D] over all tokens of ``x`` [..., D]."""
    flat = x.flatten(0, -2)
    return flat.mT @ flat / len(flat)


def measure(x: Tensor, distance_mass: Tensor) -> LayerStats:
    """Return statistics of ``x`` [N, T, D], in which early tokens receive more attention."""
    share = torch.linspace(1.8, 0.2, x.shape[1], dtype=x.dtype)[:, None]
    return LayerStats(second_moment(x), second_moment(x * share.sqrt()), distance_mass, x[..., 0].numel())


def make_layer(layout: str, *, seed: int = 0, attention_factor: float = 1.0) -> Layer:
    """Return a random float64 layer with correlated inputs and attention mass that falls with the distance."""
    spec = make_spec(layout, attention_factor=attention_factor)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
    x = normal(4, LENGTH, HIDDEN) @ (normal(HIDDEN, HIDDEN) / HIDDEN**0.5 + torch.eye(HIDDEN))
    scale = 1.5 / HIDDEN**0.5
    weights = LayerWeights(
        normal(heads, WIDTH, HIDDEN) * scale,
        normal(kv_heads, WIDTH, HIDDEN) * scale,
        normal(kv_heads, WIDTH, HIDDEN) * scale,
        normal(heads, HIDDEN, WIDTH) * WIDTH**-0.5,
    )
    mass = torch.rand(heads, LENGTH, generator=generator, dtype=torch.float64) ** 4
    mass *= torch.exp(-torch.arange(LENGTH) / 6.0)
    return Layer(spec, x, weights, measure(x, mass / mass.sum(-1, keepdim=True)))


def observed(layer: Layer) -> Layer:
    """Return the layer with the distance mass of its attention, measured as in calibration."""
    frequencies, first = torch.tensor(layer.spec.inv_freq, dtype=layer.x.dtype), LENGTH // 4
    scores = source_scores(layer.x, layer.weights, frequencies, scaling=layer.spec.scaling)
    attention = causal_softmax(scores).sum(0)[:, first:]
    attention[..., 0] = 0
    mass = sum_by_distance(attention, first)
    return replace(layer, stats=replace(layer.stats, distance_mass=mass / mass.sum(-1, keepdim=True)))


def random_characters() -> str:
    """Return calibration text whose hidden states span all directions in a tiny model.

    The latent norm is an identity only for tokens that are similar to the calibration tokens.
    """
    generator = torch.Generator().manual_seed(1)
    return "".join(map(chr, torch.randint(33, 127, (2000,), generator=generator).tolist()))


def relative(left: Tensor, right: Tensor) -> float:
    """Return ‖left − right‖/‖right‖."""
    return float((left - right).norm() / right.norm().clamp_min(torch.finfo(right.dtype).tiny))
