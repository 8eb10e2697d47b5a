"""Frozen dataclasses that the stages of a conversion pass to each other; they need only torch.

``transmla.core`` has the table of the symbols in the shapes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerKind:
    """Attention settings that may differ between the layers of one model.

    Attributes:
        inv_freq: the source's rotary frequencies [p] in radians per position; 0 for a pair that is not rotated.
        attention_factor: factor on cos and sin (yarn, longrope); 1 if only a part of a head is rotated.
        scaling, window, softcap: factor on the scores, and their rules (see ``ScoreRules``).
        rotary_factor: the same factor on the rotated channels of queries and keys, if only a part of a head is rotated.
        long_inv_freq: longrope's frequencies [p] for texts longer than ``short_length`` tokens.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float
    scaling: float
    window: int | None = None
    softcap: float | None = None
    rotary_factor: float = 1.0
    long_inv_freq: tuple[float, ...] | None = None
    short_length: int | None = None

    @property
    def rotary_pairs(self) -> int:
        """Number of rotated channel pairs; they are the first pairs of a head."""
        return sum(1 for frequency in self.inv_freq if frequency)


@dataclass(frozen=True)
class AttentionSpec:
    """Description of a source model's attention, independent of its family's class names.

    Attributes:
        inv_freq, attention_factor, scaling: those of the first kind of layers (``LayerKind``).
        layer_parameters: number of weights outside the attention in the largest layer.
        other_parameters: number of weights outside the attention in the whole model. A tied head counts once.
        normed, biased: whether queries and keys have norms, and projections have biases.
        experts, experts_per_token: number of experts in a layer, and of those that a token passes; 0 without experts.
        native_gap: names the features that DeepSeek-V3's format cannot store, or None.
        kinds, layers: if layers differ, all kinds of layers, and each layer's index into ``kinds``; otherwise empty.
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
    normed: bool = False
    biased: bool = False
    experts: int = 0
    experts_per_token: int = 0
    native_gap: str | None = None
    kinds: tuple[LayerKind, ...] = ()
    layers: tuple[int, ...] = ()

    def kind(self, layer: int) -> LayerKind:
        """Return the kind of layer number ``layer``."""
        if self.kinds:
            return self.kinds[self.layers[layer]]
        return LayerKind(self.inv_freq, self.attention_factor, self.scaling)

    def at(self, layer: int) -> AttentionSpec:
        """Return the description of one layer alone."""
        kind = self.kind(layer)
        fields = {"inv_freq": kind.inv_freq, "attention_factor": kind.attention_factor, "scaling": kind.scaling}
        return replace(self, **fields, kinds=(), layers=())  # type: ignore[arg-type]

    @property
    def features(self) -> int:
        """Number F of input features that the attention's weights read (``source.attention_view``)."""
        if self.normed:
            return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        return self.hidden_size + self.biased

    @property
    def cache_values(self) -> int:
        """Cached values per token and layer: the keys and values of all G heads."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def group_size(self) -> int:
        """Number H / G of query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True)
class MLAShape:
    """The widths of an MLA layer, named as in DeepSeek-V3.

    The first ``latent_rank`` ≤ ``kv_lora_rank`` channels of the latent carry information. The rest is zero padding
    up to a width that has fast kernels. A ``latent_rank`` of 0 means no padding.
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
        """Cached values per token and layer, r + d_r: the latent and one rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Width d_n + d_r of a query head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class RotaryPlan:
    """The source frequency of each rotary slot of the target.

    ``slots`` holds d_r/2 indices into the source's ``inv_freq``; slots may share a frequency, except in native exports.
    ``freqfold`` neighbouring source frequencies are concentrated together (FreqFold in TransMLA, arXiv 2502.07864).
    If ``measured`` is set, the conversion chooses other slots for each layer, from the layer's statistics.
    """

    slots: tuple[int, ...]
    freqfold: int
    measured: bool = False


@dataclass(frozen=True)
class ScoreRules:
    """Changes that a family makes to the scores before the softmax, in addition to the causal mask.

    A query attends to the last ``window`` keys, including its token's. With c = ``softcap``, scores s become
    c · tanh(s / c). ``sinks`` [H] are the scores of one additional key per head, which has no value.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def heads(self, chosen: slice) -> ScoreRules:
        """Return the rules for the heads in the slice ``chosen``."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[chosen])

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> ScoreRules:
        """Return the rules with ``sinks`` in ``dtype`` on ``device``."""
        return self if self.sinks is None else replace(self, sinks=self.sinks.to(device=device, dtype=dtype))


@dataclass(frozen=True)
class LayerWeights:
    """Weights q [H, d, D], k [G, d, D], v [G, d, D] and o [H, D, d] of one source attention, and its score rules."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    rules: ScoreRules = field(default=ScoreRules())

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> LayerWeights:
        """Return the weights and rules in ``dtype`` on ``device``."""
        q, k, v, o = (t.to(device=device, dtype=dtype) for t in (self.q, self.k, self.v, self.o))
        return LayerWeights(q, k, v, o, self.rules.to(dtype, device))


@dataclass(frozen=True)
class Sensitivity:
    """First-order sensitivity of an attention's output to errors on its keys and values.

    An error δs on the score and δv on the value of key j change head h's output at position i by
    W_o·a_ij (δs·(v_j − o_ih) + δv), where o_ih is the head's mixed value. Errors of different keys count as
    independent. All energies are divided by the energy of the attention's output at position i, and are means over
    positions.

    Attributes:
        key_moment: Σ E[x_j x_jᵀ] [F, F] with weights a_ij² ‖W_o(v_j − o_ih)‖².
        value_moment: Σ E[x_j x_jᵀ] [F, F] with weights a_ij².
        query_moment: E[q qᵀ] [H, d, d] of each head's queries in halves layout, with the weights of ``key_moment``.
        head_share: share [H] of each head in the weights of ``key_moment``.
        distance_mass: these weights [H, T] at each distance Δ; rows sum to one.
    """

    key_moment: Tensor
    value_moment: Tensor
    query_moment: Tensor
    head_share: Tensor
    distance_mass: Tensor

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Sensitivity:
        """Return the moments in ``dtype`` on ``device``."""
        return Sensitivity(**{name: value.to(device=device, dtype=dtype) for name, value in vars(self).items()})


@dataclass(frozen=True)
class LayerStats:
    """Calibration statistics of one layer.

    Attributes:
        second_moment: E[x xᵀ] [D, D] of the attention's input over all calibration tokens.
        attended_moment: the same [D, D] with each token weighted by Σ a², the sum of squared attention weights that
            the token receives from all heads and queries. The weights have mean one.
        distance_mass: mean attention mass [H, T] of each head at each distance Δ = i − j. The first (sink) token is
            left out. Rows sum to one, or to zero for a head that attends to the sink only.
        tokens: number of calibration tokens.
        converted_moment: E[x xᵀ] [D, D] after the earlier layers have been replaced by a method's first pass.
        sensitivity: measured for layers whose rotary slots are chosen from statistics (``RotaryPlan.measured``).
    """

    second_moment: Tensor
    attended_moment: Tensor
    distance_mass: Tensor
    tokens: int
    converted_moment: Tensor | None = None
    sensitivity: Sensitivity | None = None

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> LayerStats:
        """Return the statistics in ``dtype`` on ``device``."""
        return LayerStats(
            self.second_moment.to(device=device, dtype=dtype),
            self.attended_moment.to(device=device, dtype=dtype),
            self.distance_mass.to(device=device, dtype=dtype),
            self.tokens,
            None if self.converted_moment is None else self.converted_moment.to(device=device, dtype=dtype),
            None if self.sensitivity is None else self.sensitivity.to(dtype, device),
        )


@dataclass(frozen=True)
class LayerFactors:
    """Weights of one MLA attention layer, independent of any export format.

    ``q_nope`` [H, d_n, D] and ``q_pe`` [H, d_r, D] produce the queries; ``latent`` [r, D] and ``rope`` [d_r, D]
    produce the two cached rows. ``k_up`` [H, d_n, r] (W_UK) and ``v_up`` [H, d_v, r] (W_UV) expand the latent.
    ``o`` [H, D, d_v] is the output projection. Rotary rows are in halves layout: all real parts, then all imaginary
    parts. ``inv_freq`` [d_r/2] is in radians per position. ``scaling`` multiplies the scores, and ``rope_gain``
    multiplies their rotary part. With compressed queries, ``q_nope`` and ``q_pe`` read the output of ``q_latent``
    [q_lora_rank, D] instead of x.
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
        """Return the factors in ``dtype``; ``inv_freq`` stays at least float32, for exact angles at far positions."""
        tensors = {name: value.to(device, dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        tensors["inv_freq"] = self.inv_freq.to(device, torch.promote_types(dtype, torch.float32))
        return replace(self, rules=self.rules.to(dtype, device), **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan:
    """All decisions that a conversion makes before it reads a weight.

    ``kinds`` holds the shape and rotary slots of each of ``spec.kinds`` if there are several. ``kept`` lists the
    layers that keep the source's attention. ``rope_parameters`` are the rotary settings of the export's config.
    ``layer_slots`` holds the slots of every layer (none for a kept one) when they have been measured. A manifest's plan
    is the one before the conversion; there, the layers' entries hold the measured slots. ``layer_shapes`` holds the
    shape and rotary slots of every layer where layers have different widths; ``shape`` is then the widest of them.
    """

    spec: AttentionSpec
    shape: MLAShape
    rotary: RotaryPlan
    method: str
    dtype: str
    rope_parameters: dict[str, Any]
    notes: tuple[str, ...] = field(default=())
    format: str = "native"
    kinds: tuple[tuple[MLAShape, RotaryPlan], ...] = field(default=())
    kept: tuple[int, ...] = field(default=())
    layer_slots: tuple[tuple[int, ...], ...] = field(default=())
    layer_shapes: tuple[tuple[MLAShape, RotaryPlan], ...] = field(default=())

    @property
    def cache_ratio(self) -> float:
        """Cache size of a converted layer, as a fraction of the source's; the mean if layers have their own shapes."""
        if not self.layer_shapes:
            return self.shape.cache_values / self.spec.cache_values
        widths = [shape.cache_values for i, (shape, _) in enumerate(self.layer_shapes) if i not in self.kept]
        return sum(widths) / len(widths) / self.spec.cache_values

    @property
    def model_cache_values(self) -> int:
        """Cached values per token, summed over all layers."""
        kept, layers = len(self.kept), self.spec.num_hidden_layers
        if not self.kinds and not self.layer_shapes:
            return kept * self.spec.cache_values + (layers - kept) * self.shape.cache_values
        converted = [i for i in range(layers) if i not in self.kept]
        return kept * self.spec.cache_values + sum(self.at(i).shape.cache_values for i in converted)

    @property
    def model_cache_ratio(self) -> float:
        """Cache size of the whole export, as a fraction of the source's."""
        return self.model_cache_values / (self.spec.cache_values * self.spec.num_hidden_layers)

    def at(self, layer: int) -> Plan:
        """Return the plan for one layer alone."""
        spec = self.spec.at(layer)
        shape, rotary = self.kinds[self.spec.layers[layer]] if self.kinds else (self.shape, self.rotary)
        if self.layer_shapes:
            shape, rotary = self.layer_shapes[layer]
        if self.layer_slots and self.layer_slots[layer]:
            rotary = replace(rotary, slots=self.layer_slots[layer])
        return replace(self, spec=spec, shape=shape, rotary=rotary, kinds=(), layer_slots=(), layer_shapes=())

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as values that JSON can hold, with ``model_cache_values``."""
        return asdict(self) | {"model_cache_values": self.model_cache_values}


def value_bytes(dtype: str) -> int:
    """Return the bytes per value of ``dtype``: 4 for float32, otherwise 2."""
    return 4 if dtype == "float32" else 2
