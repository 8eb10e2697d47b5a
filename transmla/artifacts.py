"""The values that travel between the stages: frozen, plain, free of any framework but torch.

Shapes use the symbols of the field: D hidden size, H query heads, G key/value heads, d head width,
p = d/2 rotary pairs, r ``kv_lora_rank``, d_r ``qk_rope_head_dim``, d_n ``qk_nope_head_dim``,
d_v ``v_head_dim``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerKind:
    """What layers of one model may differ in.

    ``inv_freq`` holds the p rotary frequencies in radians per position as the source runs them, 0 where a channel
    stands still; ``attention_factor`` multiplies its cos and sin (yarn), ``scaling`` its scores; ``window`` and
    ``softcap`` are those of ``ScoreRules``. Where only a part of every head turns, ``turned_factor`` is the attention
    factor, of queries and keys themselves. Longrope turns texts longer than ``short_length`` by ``long_inv_freq``.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float
    scaling: float
    window: int | None = None
    softcap: float | None = None
    turned_factor: float = 1.0
    long_inv_freq: tuple[float, ...] | None = None
    short_length: int | None = None

    @property
    def turned(self) -> int:
        """Pairs of channels that turn; they come first."""
        return sum(1 for frequency in self.inv_freq if frequency)


@dataclass(frozen=True)
class AttentionSpec:
    """What a source model's attention is, independent of its family's class names.

    ``inv_freq``, ``attention_factor`` and ``scaling`` are those of its first kind of layers (``LayerKind``); where
    there are several, ``kinds`` lists them and ``layers`` gives each layer's. ``native_gap`` names what DeepSeek-V3's
    format has no place for. ``layer_parameters`` and ``other_parameters`` count the weights outside the attention: of
    the largest layer, and of the whole model; a tied head counts once.
    """

    family: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    rope_parameters: dict[str, Any]
    inv_freq: tuple[float, ...]
    attention_factor: float
    scaling: float
    layer_parameters: int
    other_parameters: int
    # Queries and keys have norms; the projections have biases.
    normed: bool = False
    biased: bool = False
    # Tokens choose among experts behind the attention.
    experts: bool = False
    native_gap: str | None = None
    kinds: tuple[LayerKind, ...] = ()
    layers: tuple[int, ...] = ()

    def kind(self, layer: int) -> LayerKind:
        """The kind of a layer."""
        if self.kinds:
            return self.kinds[self.layers[layer]]
        return LayerKind(self.inv_freq, self.attention_factor, self.scaling)

    def at(self, layer: int) -> AttentionSpec:
        """The same, as it is at one layer."""
        kind = self.kind(layer)
        given = {"inv_freq": kind.inv_freq, "attention_factor": kind.attention_factor, "scaling": kind.scaling}
        return replace(self, **given, kinds=(), layers=())  # type: ignore[arg-type]

    @property
    def features(self) -> int:
        """Width F of what the attention's weights read (``frontend``)."""
        if self.normed:
            return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        return self.hidden_size + self.biased

    @property
    def cache_values(self) -> int:
        """Cached values per token and layer: keys and values of all G heads."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True)
class MLAShape:
    """The five widths of an MLA layer, by DeepSeek-V3's names.

    ``latent_rank`` ≤ ``kv_lora_rank`` is the part of the latent that carries information; the rest is
    zero padding up to a width that has fast kernels.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    latent_rank: int = 0

    def __post_init__(self) -> None:
        if not self.latent_rank:
            object.__setattr__(self, "latent_rank", self.kv_lora_rank)

    @property
    def cache_values(self) -> int:
        """Cached values per token and layer: the latent and one rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class RotaryPlan:
    """Which source frequency each rotary slot of the target turns with.

    ``slots[s]`` is the index into the source's ``inv_freq`` of slot s (d_r/2 slots); several slots may
    name one frequency in the mathematics, never in a native export. ``freqfold`` is the number of
    neighbouring source frequencies that are concentrated together (TransMLA, arXiv 2502.07864, FreqFold).
    """

    slots: tuple[int, ...]
    freqfold: int


@dataclass(frozen=True)
class ScoreRules:
    """What a family does to scores on their way to the softmax, beside hiding the future.

    A query sees the ``window`` last keys, itself included; scores s become ``softcap`` · tanh(s / ``softcap``);
    ``sinks`` [H] are the scores of one more key for each head, which has no value.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def heads(self, chosen: slice) -> ScoreRules:
        """The rules of some of the heads."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[chosen])

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> ScoreRules:
        return self if self.sinks is None else replace(self, sinks=self.sinks.to(device=device, dtype=dtype))


@dataclass(frozen=True)
class LayerWeights:
    """One source attention layer: q [H, d, D], k [G, d, D], v [G, d, D], o [H, D, d], and its rules."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    rules: ScoreRules = field(default=ScoreRules())

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> LayerWeights:
        q, k, v, o = (t.to(device=device, dtype=dtype) for t in (self.q, self.k, self.v, self.o))
        return LayerWeights(q, k, v, o, self.rules.to(dtype, device))


@dataclass(frozen=True)
class LayerStats:
    """What calibration saw at one layer.

    ``second_moment`` is E[x xᵀ] [D, D] of the attention's input over all calibration tokens;
    ``attended_moment`` [D, D] the same with each token weighted by Σ a² over the heads and queries that
    attend to it (weights of mean one); ``distance_mass`` [H, T] is the mean attention mass a head pays at
    each distance Δ = i − j, the window's first (sink) token left out, each row summing to one (or to zero
    for a head that looks nowhere else). ``converted_moment`` [D, D] is E[x xᵀ] again, where layers before this
    one have lost their RoPE (methods that ask for it).
    """

    second_moment: Tensor
    attended_moment: Tensor
    distance_mass: Tensor
    tokens: int
    converted_moment: Tensor | None = None

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> LayerStats:
        return LayerStats(
            self.second_moment.to(device=device, dtype=dtype),
            self.attended_moment.to(device=device, dtype=dtype),
            self.distance_mass.to(device=device, dtype=dtype),
            self.tokens,
            None if self.converted_moment is None else self.converted_moment.to(device=device, dtype=dtype),
        )


@dataclass(frozen=True)
class LayerFactors:
    """One MLA attention layer, before any runtime's layout is applied.

    ``q_nope`` [H, d_n, D] and ``q_pe`` [H, d_r, D] produce the queries, ``latent`` [r, D] and ``rope``
    [d_r, D] the two cached rows, ``k_up`` [H, d_n, r] (W_UK) and ``v_up`` [H, d_v, r] (W_UV) expand the
    latent, ``o`` [H, D, d_v] is the output projection. Rotary rows are in halves layout (all real parts,
    then all imaginary parts). ``scaling`` multiplies the scores, ``rope_gain`` the rotary part of them.
    With compressed queries, ``q_latent`` [q_lora_rank, D] comes first and the query maps read it, not x.
    """

    q_nope: Tensor
    q_pe: Tensor
    latent: Tensor
    rope: Tensor
    k_up: Tensor
    v_up: Tensor
    o: Tensor
    inv_freq: Tensor
    scaling: float
    rope_gain: float = 1.0
    q_latent: Tensor | None = None
    rules: ScoreRules = field(default=ScoreRules())

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> LayerFactors:
        """The factors in ``dtype``; frequencies stay float32 at least, or far positions turn by wrong angles."""
        tensors = {name: value.to(device, dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        tensors["inv_freq"] = self.inv_freq.to(device, torch.promote_types(dtype, torch.float32))
        return replace(self, rules=self.rules.to(dtype, device), **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan:
    """Everything a conversion decided before it touched a weight."""

    spec: AttentionSpec
    shape: MLAShape
    rotary: RotaryPlan
    method: str
    dtype: str
    rope_parameters: dict[str, Any]
    notes: tuple[str, ...] = field(default=())
    format: str = "native"
    # Shape and slots of each of ``spec.kinds``, where there are several.
    kinds: tuple[tuple[MLAShape, RotaryPlan], ...] = field(default=())
    # Layers that keep the source's attention.
    kept: tuple[int, ...] = field(default=())

    @property
    def cache_ratio(self) -> float:
        """Of the layers that are converted."""
        return self.shape.cache_values / self.spec.cache_values

    @property
    def model_cache_values(self) -> int:
        """Cached values per token over all layers."""
        kept, layers = len(self.kept), self.spec.num_hidden_layers
        if not self.kinds:
            return kept * self.spec.cache_values + (layers - kept) * self.shape.cache_values
        converted = [i for i in range(layers) if i not in self.kept]
        return kept * self.spec.cache_values + sum(self.at(i).shape.cache_values for i in converted)

    def at(self, layer: int) -> Plan:
        """The plan for one layer alone."""
        spec = self.spec.at(layer)
        if not self.kinds:
            return replace(self, spec=spec)
        shape, rotary = self.kinds[self.spec.layers[layer]]
        return replace(self, spec=spec, shape=shape, rotary=rotary, kinds=())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"model_cache_values": self.model_cache_values}


def value_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
