"""Multi-head latent attention for any family: the family's transformers classes with ``self_attn`` replaced.

This file and ``configuration_transmla.py`` are all the code that an export of the transmla format contains. They import
only torch and transformers.

Shapes: B sequences, T tokens, D hidden size, H heads, r latent width (``kv_lora_rank``), d_r rotary width
(``qk_rope_head_dim``), d_n other width of queries and keys (``qk_nope_head_dim``), d_v value width (``v_head_dim``).
"""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from .configuration_transmla import TransmlaConfig, config_class, write_code

# Attributes of a family's attention that change the scores, and the argument names of attention functions for them.
SCORE_EXTRAS = {"sliding_window": "sliding_window", "attn_logit_softcapping": "softcap", "sinks": "s_aux"}
# Modules that are kept from a family with RMSNorms on queries and keys.
NORMED = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")


class LatentRMSNorm(nn.Module):
    """RMSNorm of the latent [..., r] (DeepSeek-V2, arXiv 2405.04434)."""

    def __init__(self, rank: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(rank)), eps

    def forward(self, kv_c: Tensor) -> Tensor:
        """Divide each latent of ``kv_c`` [..., r] by its root mean square and multiply it by the weight [r]."""
        wide = kv_c.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(kv_c.dtype)


class Frequencies(nn.Module):
    """Rotary frequencies [d_r / 2] of a layer, from its entry in the config's ``mla["kinds"]``.

    Longrope has two tables. As soon as one position reaches ``short_length``, the long table applies to all positions.
    """

    def __init__(self, kind: dict[str, Any]) -> None:
        super().__init__()
        short = kind["inv_freq"]
        self.listed = [short, kind["long_inv_freq"]] if "long_inv_freq" in kind else [short]
        if any(2 * len(table) != kind["qk_rope_head_dim"] for table in self.listed):
            raise ValueError(f"inv_freq must hold {kind['qk_rope_head_dim'] // 2} frequencies")
        self.short_length, self.factor = kind.get("original_max_position_embeddings"), kind["attention_factor"]
        # The buffer stores the bits of float32 values as integers, so that casting a model to half precision does not
        # round the frequencies. Rounded frequencies give wrong angles at large positions.
        self.bits: Tensor
        self.register_buffer("bits", torch.empty(len(self.listed), len(short), dtype=torch.int32), persistent=False)
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """Write the frequencies from the config into the buffer, which no checkpoint contains."""
        self.bits.copy_(torch.tensor(self.listed, dtype=torch.float32).view(torch.int32))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [B, 1, T, d_r / 2] for ``positions`` [B, T]."""
        tables = self.bits.view(torch.float32)
        inv_freq = tables[0]
        if self.short_length is not None:
            inv_freq = torch.where(positions.max() < self.short_length, inv_freq, tables[1])
        angles = positions[:, None, :, None].float() * inv_freq
        return angles.cos() * self.factor, angles.sin() * self.factor


class PerHead(nn.Module):
    """Separate linear map for each head, [..., H, d] → [..., H, n], with weight [H · n, d].

    The class is not an ``nn.Linear``, because adapters and quantisers would treat it as one map for all heads.
    """

    bias = None

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [B, T, H, d] to [B, T, H, n], with one matrix product per head for all tokens."""
        heads, tokens = self.weight.unflatten(0, (x.shape[-2], -1)), x.shape[:-2]
        return (x.flatten(0, -3).transpose(0, 1) @ heads.mT).transpose(0, 1).unflatten(0, tokens)


class TransmlaAttention(nn.Module):
    """Attention to a cached latent and one rotary key; replaces a family's ``self_attn``.

    Queries and cached rows are linear maps of the hidden states, unless the family normalises queries and keys. Then
    the family's projections and norms stay. Queries are mapped from the normalised queries, head by head
    (``q_b_proj``), and cached rows from the normalised keys and the values (``kv_a_proj_with_mqa``).

    Args:
        attention: the family's attention module.
        config: config of the transmla format.
        layer_idx: index of the layer.

    Raises:
        ValueError: if the family's attention has a feature that this class does not support (see ``refuse_unknown``).
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
        # The family's eager attention applies the family's changes to the scores.
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
        """Attend with the tokens of ``hidden_states`` to all cached tokens.

        Args:
            hidden_states: [B, T, D].
            position_embeddings: ignored, because the model computes these with the source's head width.
            attention_mask: mask as the attention implementation expects it.
            past_key_values: the cache, as transformers until 5.23 passes it.
            position_ids: positions [B, T].
            cache: the cache, as newer transformers passes it.
            kwargs: passed on to the attention implementation.

        Returns:
            Output [B, T, D], and the attention weights if the implementation returns them.

        Raises:
            ValueError: if ``position_ids`` is None.
        """
        if position_ids is None:
            raise ValueError(
                f"{type(self).__name__} needs position_ids, because its rotary frequencies differ from the model's; "
                "call the model, which passes position_ids, or pass them to the layer"
            )
        query, cached = self._project(hidden_states)
        q_pe = query.transpose(1, 2)[..., self.qk_nope_head_dim :]
        kv_c, k_pe = cached[:, None].split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        kv_c = self.kv_a_layernorm(kv_c)
        # Queries and key are rotated together: a decode step is bound by the number of kernel launches.
        rotated = self._rotate(position_ids, torch.cat([q_pe, k_pe], 1))
        q_pe, k_pe = rotated.split([self.num_heads, 1], 1)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            kv_c, k_pe = cache.update(kv_c, k_pe, self.layer_idx)
        key, value = self.expand_kv(kv_c, k_pe)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        extras = {argument: getattr(self, attribute) for attribute, argument in SCORE_EXTRAS.items()}
        output, weights = attend(
            self,
            self.with_rotated(query, q_pe),
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
        """Expand ``kv_c`` [B, 1, T, r] and ``k_pe`` [B, 1, T, d_r] for all heads.

        Returns:
            Keys [B, H, T, d_n + d_r] and values [B, H, T, d_v].
        """
        expanded = self.kv_b_proj(kv_c[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, value = expanded.split([self.qk_nope_head_dim, self.v_head_dim], -1)
        return torch.cat([k_nope, k_pe.expand(-1, self.num_heads, -1, -1)], -1), value

    def with_rotated(self, query: Tensor, q_pe: Tensor) -> Tensor:
        """Return ``query`` [B, T, H, d_n + d_r] as [B, H, T, d_n + d_r], with ``q_pe`` [B, H, T, d_r] at the end."""
        return torch.cat([query.transpose(1, 2)[..., : self.qk_nope_head_dim], q_pe], -1)

    def __reduce__(self) -> Any:
        """Pickle the family's class instead of this one, which ``attention_class`` creates at run time."""
        classes = type(self).__mro__
        return _bare_attention, (classes[classes.index(TransmlaAttention) + 1],), self.__dict__

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, d_n + d_r] and cached rows [B, T, r + d_r] of ``x`` [B, T, D], before the rotation."""
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

    def _rotate(self, positions: Tensor, rows: Tensor) -> Tensor:
        """Apply the layer's rotary embedding to ``rows`` [B, ·, T, d_r], in which (i, i + d_r / 2) are pairs."""
        cos, sin = self.frequencies(positions)
        real, imaginary = rows.float().chunk(2, -1)
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1).to(rows.dtype)


def norm_heads(norm: Any, x: Tensor, width: int) -> Tensor:
    """Apply a family's ``norm`` to ``x`` [..., heads · width].

    The norm covers all heads at once if its weight has heads · width entries, else each head separately.
    """
    if norm.weight.numel() == x.shape[-1]:
        return norm(x)  # type: ignore[no-any-return]
    return norm(x.unflatten(-1, (-1, width))).flatten(-2)  # type: ignore[no-any-return]


def has_bias(attention: Any) -> bool:
    """Return whether the query, key and value projections of a family's ``attention`` have biases."""
    return (attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.q_proj).bias is not None


def window_of(attention: Any, config: Any, layer_idx: int) -> int | None:
    """Return the sliding window of a layer in tokens, or None if the layer has no window.

    Some families store the window in the attention module, others only in the config. A config value is ignored if the
    family's config class has no such field.
    """
    if not hasattr(type(config), "sliding_window"):
        return None
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    types = getattr(config, "layer_types", None) if hasattr(type(config), "layer_types") else None
    slides = types is None or types[layer_idx] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


def refuse_unknown(attention: Any, config: Any) -> None:
    """Check that latent attention supports all features of a family's ``attention``.

    Raises:
        ValueError: if the attention has other features; the message lists them.
    """
    unknown = {name for name, _ in attention.named_children()} - {*NORMED, "qkv_proj", "o_proj"}
    unknown |= set() if attention.is_causal else {"non-causal attention"}
    unknown |= {"clip_qkv"} if getattr(config, "clip_qkv", None) else set()
    rope = getattr(config, "rope_parameters", None) or {}
    for table in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        # Dynamic frequencies change with the length of the text.
        unknown |= {"rope_type dynamic"} if table.get("rope_type") == "dynamic" else set()
        unknown |= {"llama_4_scaling_beta"} if table.get("llama_4_scaling_beta") else set()
    if unknown:
        raise ValueError(
            f"{type(attention).__name__} has features that latent attention does not support: "
            f"{', '.join(sorted(unknown))}; keep the attention of these layers (None in mla.layers)"
        )


@cache
def attention_class(plain: Any) -> type[nn.Module]:
    """Return the latent attention class for a family's attention class ``plain``, as a subclass of ``plain``."""
    return type(f"Transmla{plain.__name__}", (TransmlaAttention, plain), {"__module__": __name__})


def _bare_attention(plain: Any) -> Any:
    """Latent attention for the class ``plain`` without state, for unpickling."""
    made = attention_class(plain)
    return made.__new__(made)


def _bare_model(family: str, task: str) -> Any:
    """A model of ``family`` without state, for unpickling."""
    made = model_class(family, task)
    return made.__new__(made)


def _initialise(decoder: Any, module: Any) -> None:
    """Initialise a module whose parameters are not in the checkpoint; transformers calls this for each such module."""
    if isinstance(module, Frequencies):
        module.fill()
    elif isinstance(module, PerHead):
        nn.init.normal_(module.weight, std=decoder.config.initializer_range)
    else:
        type(decoder)._init_weights(decoder, module)


class _Converted:
    """Mixin placed before a family's model class; replaces the attention of the layers once the model is built."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        decoder: Any = self.get_decoder()  # type: ignore[attr-defined]
        if decoder is not self and hasattr(decoder, "task"):
            # Classifiers build their decoder by ``AutoModel``, which has replaced the attention.
            return
        # The family's ``_init_weights`` does not know the new modules.
        decoder._init_weights = partial(_initialise, decoder)
        for i, layer in enumerate(decoder.layers):
            if config.mla["layers"][i] is not None:
                plain: Any = type(layer.self_attn)
                layer.self_attn = attention_class(plain)(layer.self_attn, config, i)
        decoder.init_weights()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model as transformers does, and beside it the code that loads it."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            write_code(Path(save_directory), Path(__file__).parent)

    def __reduce__(self) -> Any:
        """Pickle the family's name instead of this class, which ``model_class`` creates at run time."""
        return _bare_model, (self.config.source_model_type, self.task), self.__dict__  # type: ignore[attr-defined]


# Options of ``from_pretrained`` that also locate the config.
WHERE = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


class _Entry(PreTrainedModel):  # type: ignore[misc]
    """Class that ``auto_map`` names; its ``from_pretrained`` returns a model of the config's family."""

    config_class = TransmlaConfig
    task: str

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError(f"{type(self).__name__} cannot be constructed; call its from_pretrained")

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a model of the transmla format; the arguments are those of ``PreTrainedModel.from_pretrained``."""
        if config is None:
            location = {name: kwargs[name] for name in WHERE if name in kwargs}
            config = TransmlaConfig.from_pretrained(path, **location)
        return cls._of(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls._of(config)._from_config(config, **kwargs)

    @classmethod
    def _of(cls, config: Any) -> Any:
        return model_class(config.source_model_type, cls.task)


class TransmlaModel(_Entry):
    """Decoder without a head, of any family."""

    task = "AutoModel"


class TransmlaForCausalLM(_Entry):
    """Causal language model of any family."""

    task = "AutoModelForCausalLM"


class TransmlaForSequenceClassification(_Entry):
    """Classifier of texts, of any family that has one."""

    task = "AutoModelForSequenceClassification"


class TransmlaForTokenClassification(_Entry):
    """Classifier of tokens, of any family that has one."""

    task = "AutoModelForTokenClassification"


# Classes of the families, by the Auto class that looks them up.
FAMILY_CLASSES: dict[str, Any] = {
    "AutoModel": MODEL_MAPPING,
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModelForTokenClassification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}


@cache
def model_class(family: str, task: str) -> Any:
    """Return the model class of ``family`` with latent attention.

    Args:
        family: a ``model_type`` of transformers.
        task: name of the Auto class whose head the model has, a key of ``FAMILY_CLASSES``.

    Raises:
        ValueError: if transformers has no such class for this family.
    """
    source: Any = FAMILY_CLASSES[task].get(CONFIG_MAPPING[family], None)
    if source is None:
        raise ValueError(
            f"transformers has no {task.removeprefix('AutoModelFor')} class for {family}; use another head"
        )
    name = f"Transmla{source.__name__}"
    # A checkpoint may use the family's older tensor names (one tensor for each expert). transformers looks up their
    # conversion by class name, so the family's conversion is registered for the new class as well.
    names = get_checkpoint_conversion_mapping(source.__name__) or get_checkpoint_conversion_mapping(family)
    if names:
        register_checkpoint_conversion_mapping(name, names, overwrite=True)
    # Classifiers build their decoder by ``AutoModel``.
    AutoModel.register(config_class(family), TransmlaModel, exist_ok=True)
    body = {"config_class": config_class(family), "task": task, "__module__": __name__}
    return type(name, (_Converted, source), body)
