"""Multi-head latent attention in any family: the source's own classes, of which only ``self_attn`` is replaced.

With its config, this file is all the code that an export of the own format brings along: torch and transformers only.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from .configuration_transmla import TransmlaConfig, config_class, write_code

# What a family's attention adds to its scores: the attribute that holds it, and its name in attention functions.
SCORE_EXTRAS = {"sliding_window": "sliding_window", "attn_logit_softcapping": "softcap", "sinks": "s_aux"}
# Projections and norms of a family that norms its queries and keys.
NORMED = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")


class LatentRMSNorm(nn.Module):
    """RMSNorm of the latent [..., r] (DeepSeek-V2, arXiv 2405.04434)."""

    def __init__(self, rank: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(rank)), eps

    def forward(self, kv_c: Tensor) -> Tensor:
        """Every latent divided by its own root mean square."""
        wide = kv_c.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(kv_c.dtype)


class Frequencies(nn.Module):
    """What rotary slots turn by: frequencies of their own, as a ``kind`` of layers in a config lists them.

    Longrope has two tables, and takes the long one for all positions once one of them lies behind ``short_length``.
    """

    def __init__(self, kind: dict[str, Any]) -> None:
        super().__init__()
        short = kind["inv_freq"]
        self.listed = [short, kind["long_inv_freq"]] if "long_inv_freq" in kind else [short]
        self.short_length, self.factor = kind.get("original_max_position_embeddings"), kind["attention_factor"]
        # Integers: what casts a model must leave these as they are, or far positions turn by wrong angles.
        self.bits: Tensor
        self.register_buffer("bits", torch.empty(len(self.listed), len(short), dtype=torch.int32), persistent=False)
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """Put the frequencies where they belong: no checkpoint holds them."""
        self.bits.copy_(torch.tensor(self.listed, dtype=torch.float32).view(torch.int32))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, 1, T, d_r/2] of ``positions`` [B, T]."""
        tables = self.bits.view(torch.float32)
        inv_freq = tables[0]
        if self.short_length is not None:
            inv_freq = torch.where(positions.max() < self.short_length, inv_freq, tables[1])
        angles = positions[:, None, :, None].float() * inv_freq
        return angles.cos() * self.factor, angles.sin() * self.factor


class PerHead(nn.Module):
    """A linear map of each head's own features, [..., H, d] → [..., H, n]; the weight is [H · n, d].

    No ``nn.Linear``: adapters and quantisers would take it for one map of all heads.
    """

    bias = None

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, x: Tensor) -> Tensor:
        """One product for each head, of all tokens together."""
        heads, tokens = self.weight.unflatten(0, (x.shape[-2], -1)), x.shape[:-2]
        return (x.flatten(0, -3).transpose(0, 1) @ heads.mT).transpose(0, 1).unflatten(0, tokens)


class TransmlaAttention(nn.Module):
    """Attention to a cached latent and one rotary key, in the place of a family's own ``attention``.

    Queries and cached rows are linear in the hidden states. Where the family norms its queries and keys they are not:
    there its projections and norms stay, queries come head by head from its normed queries (``q_b_proj``), and cached
    rows from its normed keys and its values.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(self, attention: Any, config: Any, layer_idx: int) -> None:
        nn.Module.__init__(self)
        refuse_unknown(attention, config)
        kind = config.mla["kinds"][config.mla["layers"][layer_idx]]
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.num_key_value_groups, self.head_dim = config.num_attention_heads, 1, attention.head_dim
        self.kv_lora_rank, self.qk_rope_head_dim = kind["kv_lora_rank"], kind["qk_rope_head_dim"]
        self.qk_nope_head_dim, self.v_head_dim = kind["qk_nope_head_dim"], kind["v_head_dim"]
        self.frequencies = Frequencies(kind)
        self.scaling, self.is_causal = attention.scaling, attention.is_causal
        self.attention_dropout = attention.attention_dropout
        self.residual_dropout = getattr(attention, "residual_dropout", 0.0)
        self.sliding_window = window_of(attention, config, layer_idx)
        self.attn_logit_softcapping = getattr(attention, "attn_logit_softcapping", None)
        self.sinks = getattr(attention, "sinks", None)
        # The family's own, which knows what the family adds to its scores.
        self.eager = sys.modules[type(attention).__module__].eager_attention_forward

        heads, cached = self.num_heads, self.kv_lora_rank + self.qk_rope_head_dim
        wide = self.qk_nope_head_dim + self.qk_rope_head_dim
        biased = has_bias(attention)
        self.q_b_proj: PerHead | None = None
        if hasattr(attention, "q_norm"):
            for name in NORMED:
                self.add_module(name, getattr(attention, name))
            self.q_b_proj = PerHead(self.head_dim, heads * wide)
            self.kv_a_proj_with_mqa = nn.Linear(2 * config.num_key_value_heads * self.head_dim, cached, bias=False)
        else:
            self.q_proj = nn.Linear(config.hidden_size, heads * wide, bias=biased)
            self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, cached, bias=biased)
        self.kv_a_layernorm = LatentRMSNorm(self.kv_lora_rank) if kind["latent_norm"] else nn.Identity()
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_head_dim, config.hidden_size, bias=attention.o_proj.bias is not None)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, T, D] for hidden states [B, T, D], and attention weights where the implementation has them.

        ``position_ids`` [B, T] turn the rotary rows; the model's ``position_embeddings`` are of its own widths. The
        ``cache`` is called ``past_key_values`` by transformers until 5.23.
        """
        if position_ids is None:
            raise ValueError(
                f"{type(self).__name__} was given no position_ids: it turns by frequencies of its own; "
                "call the model, which passes them, or pass them to the layer"
            )
        query, cached = self._project(hidden_states)
        q_nope, q_pe = query.transpose(1, 2).split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        kv_c, k_pe = cached[:, None].split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        kv_c = self.kv_a_layernorm(kv_c)
        # Turned together: a step is many small operations, and each one costs its launch.
        turned = self._turn(position_ids, torch.cat([q_pe, k_pe], 1))
        q_pe, k_pe = turned.split([self.num_heads, 1], 1)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            kv_c, k_pe = cache.update(kv_c, k_pe, self.layer_idx)
        key, value = self.expand_kv(kv_c, k_pe)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        extras = {given: getattr(self, name) for name, given in SCORE_EXTRAS.items()}
        output, weights = attend(
            self,
            torch.cat([q_nope, q_pe], -1),
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **{name: extra for name, extra in extras.items() if extra is not None},
            **kwargs,
        )
        output = self.o_proj(output.reshape(*hidden_states.shape[:2], -1))
        return dropout(output, self.residual_dropout, self.training), weights

    def expand_kv(self, kv_c: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, H, T, d_n + d_r] and values [B, H, T, d_v] of all heads, from [B, 1, T, r] and [B, 1, T, d_r]."""
        expanded = self.kv_b_proj(kv_c[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, value = expanded.split([self.qk_nope_head_dim, self.v_head_dim], -1)
        return torch.cat([k_nope, k_pe.expand(-1, self.num_heads, -1, -1)], -1), value

    def __reduce__(self) -> Any:
        """Pickled by the family's class: this one is made when it is needed."""
        return _bare_attention, (type(self).__mro__[2],), self.__dict__

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, d_n + d_r] and cached rows [B, T, r + d_r], not turned yet."""
        heads = self.num_heads, -1
        query = self.q_proj(x)
        if self.q_b_proj is None:
            return query.unflatten(-1, heads), self.kv_a_proj_with_mqa(x)
        query, key = (
            norm_heads(self.q_norm, query, self.head_dim),
            norm_heads(self.k_norm, self.k_proj(x), self.head_dim),
        )
        cached = self.kv_a_proj_with_mqa(torch.cat([key, self.v_proj(x)], -1))
        return self.q_b_proj(query.unflatten(-1, heads)), cached

    def _turn(self, positions: Tensor, rows: Tensor) -> Tensor:
        """Rotary embedding of ``rows`` [B, ·, T, d_r] in halves layout, by this layer's own frequencies."""
        cos, sin = self.frequencies(positions)
        real, imaginary = rows.float().chunk(2, -1)
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1).to(rows.dtype)


def norm_heads(norm: Any, x: Tensor, width: int) -> Tensor:
    """A family's ``norm`` of all heads [..., heads · ``width``] together, or of each."""
    if norm.weight.numel() == x.shape[-1]:
        return norm(x)  # type: ignore[no-any-return]
    return norm(x.unflatten(-1, (-1, width))).flatten(-2)  # type: ignore[no-any-return]


def has_bias(attention: Any) -> bool:
    """Whether a family's queries, keys and values have biases."""
    return (attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.q_proj).bias is not None


def window_of(attention: Any, config: Any, layer_idx: int) -> int | None:
    """How far back a layer looks: some families tell its attention, others leave it to the config.

    A family whose configs have no such field does not look at one.
    """
    if not hasattr(type(config), "sliding_window"):
        return None
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    types = getattr(config, "layer_types", None)
    slides = types is None or types[layer_idx] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


def refuse_unknown(attention: Any, config: Any) -> None:
    """Refuse what a family does that this attention would leave out.

    Raises:
        ValueError: naming it.
    """
    unknown = {name for name, _ in attention.named_children()} - {*NORMED, "qkv_proj", "o_proj"}
    unknown |= set() if attention.is_causal else {"attention to the future"}
    unknown |= {"clip_qkv"} if getattr(config, "clip_qkv", None) else set()
    rope = getattr(config, "rope_parameters", None) or {}
    for table in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        # Its frequencies change with every length of the text.
        unknown |= {"rope_type dynamic"} if table.get("rope_type") == "dynamic" else set()
        unknown |= {"llama_4_scaling_beta"} if table.get("llama_4_scaling_beta") else set()
    if unknown:
        raise ValueError(
            f"{type(attention).__name__} has what latent attention would leave out: {', '.join(sorted(unknown))}; "
            "let its layers keep their attention (None in mla.layers)"
        )


@cache
def attention_class(plain: Any) -> type[nn.Module]:
    """Latent attention that is, to whatever looks for it, a family's ``plain`` one."""
    return type(f"Transmla{plain.__name__}", (TransmlaAttention, plain), {"__module__": __name__})


def _bare_attention(plain: Any) -> Any:
    """Latent attention in the place of ``plain``, without its state."""
    found = attention_class(plain)
    return found.__new__(found)


def _bare_model(family: str, head: bool) -> Any:
    """A model of ``family`` without its state."""
    found = model_class(family, head=head)
    return found.__new__(found)


def _initialise(decoder: Any, module: Any) -> None:
    """What transformers calls for every module that no checkpoint gave its values."""
    if isinstance(module, Frequencies):
        module.fill()
    elif isinstance(module, PerHead):
        nn.init.normal_(module.weight, std=decoder.config.initializer_range)
    else:
        type(decoder)._init_weights(decoder, module)


class _Converted:
    """Mixed in before a family's model: built as it is, then latent attention put into its layers."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        decoder: Any = self.get_decoder()  # type: ignore[attr-defined]
        # The decoder's own class knows nothing of what is new in its layers.
        decoder._init_weights = partial(_initialise, decoder)
        for i, layer in enumerate(decoder.layers):
            if config.mla["layers"][i] is not None:
                plain: Any = type(layer.self_attn)
                layer.self_attn = attention_class(plain)(layer.self_attn, config, i)
        decoder.init_weights()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As of any model of transformers, with the code that reads it."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            write_code(Path(save_directory), Path(__file__).parent)

    def __reduce__(self) -> Any:
        """Pickled by its family: its class is made when it is needed."""
        return _bare_model, (self.config.source_model_type, self.head), self.__dict__  # type: ignore[attr-defined]


# What of the options of a model's ``from_pretrained`` says where its config is.
WHERE = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


class _Entry(PreTrainedModel):  # type: ignore[misc]
    """What an ``auto_map`` names: a door to the class of the family that a config names."""

    config_class = TransmlaConfig
    head: bool

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError(f"{type(self).__name__} is a door to many classes: call its from_pretrained")

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As of any model of transformers."""
        if config is None:
            where = {name: kwargs[name] for name in WHERE if name in kwargs}
            config = TransmlaConfig.from_pretrained(path, **where)
        return cls._of(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls._of(config)._from_config(config, **kwargs)

    @classmethod
    def _of(cls, config: Any) -> Any:
        return model_class(config.source_model_type, head=cls.head)


class TransmlaModel(_Entry):
    """A decoder without its head."""

    head = False


class TransmlaForCausalLM(_Entry):
    """A causal language model."""

    head = True


@cache
def model_class(family: str, *, head: bool) -> Any:
    """The decoder of ``family`` (a ``model_type`` of transformers), or its causal LM, with latent attention."""
    source: Any = (MODEL_FOR_CAUSAL_LM_MAPPING if head else MODEL_MAPPING)[CONFIG_MAPPING[family]]
    name = f"Transmla{source.__name__}"
    # Checkpoints may name tensors as the family once did (one for each expert): transformers converts them by class.
    names = get_checkpoint_conversion_mapping(source.__name__) or get_checkpoint_conversion_mapping(family)
    if names:
        register_checkpoint_conversion_mapping(name, names, overwrite=True)
    body = {"config_class": config_class(family), "head": head, "__module__": __name__}
    return type(name, (_Converted, source), body)
