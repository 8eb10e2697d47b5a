"""The contract of a model family, the checks that all families share, and the basis of their tiny configs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transmla.errors import TransmlaError

# Supported rotary scalings. Their frequencies do not depend on the exact length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")

# Methods by which a config may say that its weights are packed, whose weights ``source.packed_weights`` reads.
PACKED = ("fp8", "compressed-tensors")


def check_common(config: Any) -> None:
    """Check that a source's ``config`` has no feature that every export format lacks.

    Raises:
        TransmlaError: if a number is out of range, weights are quantised, the rope type is unknown, or the query heads
            are not a multiple of the key/value heads.
    """
    name = config.model_type
    _check_numbers(config)
    quantisation = getattr(config, "quantization_config", None)
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if method not in (None, "gguf", *PACKED):
        raise refuse(
            name,
            f"{method} weights are not supported",
            f"a conversion reads float32, float16 or bfloat16 weights, and packed ones of {' and '.join(PACKED)}",
            "convert the unquantised model that they were made from, and quantise its export",
        )
    for table in rope_tables(config):
        rope_type = table.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            # Dynamic scaling equals the default for texts up to this length.
            short = "if no text is longer than max_position_embeddings, set rope_type 'default' in config.json"
            remedy = {"remedy": short} if rope_type == "dynamic" else {}
            limit = f"supported: {', '.join(ROPE_TYPES)}"
            raise refuse(name, f"rope_type '{rope_type}' is not supported", limit, **remedy)
    if config.num_attention_heads % config.num_key_value_heads:
        raise refuse(
            name,
            f"{config.num_attention_heads} query heads cannot share {config.num_key_value_heads} key heads equally",
            "the number of query heads must be a multiple of the number of key/value heads",
            "check config.json",
        )


# Config fields that count something: a model without layers, heads or tokens is none.
POSITIVE = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"),
    *("vocab_size", "head_dim", "max_position_embeddings", "num_experts", "num_local_experts"),
    *("num_experts_per_tok", "moe_intermediate_size", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *("final_logit_softcapping", "logits_scaling"),
)
# Fields of the rotary settings that are divided by, or raised to a power.
POSITIVE_ROPE = ("rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")


def _check_numbers(config: Any) -> None:
    """Check that the numbers of ``config`` describe a model.

    Raises:
        TransmlaError: if a count or width is not above 0, eps is negative, or a layer has a window without a width.
    """
    name = config.model_type
    values = [(key, getattr(config, key, None)) for key in POSITIVE]
    values += [(key, table.get(key)) for table in rope_tables(config) for key in POSITIVE_ROPE]
    for key, value in values:
        if value is not None and not (_is_number(value) and value > 0):
            raise refuse(name, f"{key} is {value!r}", "it must be a number above 0", "correct config.json")
    eps = getattr(config, "rms_norm_eps", 0.0)
    if not (_is_number(eps) and 0 <= eps < 1):
        raise refuse(name, f"rms_norm_eps is {eps!r}", "it must be at least 0 and below 1", "correct config.json")
    for table in rope_tables(config):
        share = table.get("partial_rotary_factor", 1.0)
        if not (_is_number(share) and 0 < share <= 1):
            raise refuse(
                name, f"partial_rotary_factor is {share!r}", "it must be above 0 and at most 1", "correct config.json"
            )
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if experts and chosen and chosen > experts:
        raise refuse(name, f"num_experts_per_tok is {chosen}", f"there are {experts} experts", "correct config.json")
    layer_types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in list(layer_types) if layer_types else window is not None
    # Some families write a window of 0 for none, beside layers that are all full.
    if windowed and not (window is not None and _is_number(window) and window > 0):
        raise refuse(
            name, f"sliding_window is {window!r}", "layers with windows need a number above 0", "correct config.json"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def rope_tables(config: Any) -> list[dict[str, Any]]:
    """Return the rotary settings of ``config``: one dict, or one dict for each kind of layer."""
    rope = config.rope_parameters or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)]
    return kinds or [rope]


@dataclass(frozen=True)
class Family:
    """One model family, keyed by the ``model_type`` of its Hugging Face config.

    Attributes:
        name: the ``model_type``.
        native: function of a config that names the feature DeepSeek-V3's format cannot store, or returns None.
        tiny: config settings of a model for tests, small enough to build in milliseconds.
        models: the family's entry in the support table.
        check: function of a config that raises ``TransmlaError`` for a feature no format supports.
        after_attention: name of the layer's module that first reads the hidden states after the attention.
        interleaved: whether the two channels of a rotary pair are neighbours; otherwise they are d/2 apart.
        tensors: the checkpoint's tensor name for each role; ``{i}`` stands for the number of the layer.
    """

    name: str
    native: Callable[[Any], str | None]
    tiny: Mapping[str, Any]
    models: str = ""
    check: Callable[[Any], None] = check_common
    after_attention: str = "post_attention_layernorm"
    interleaved: bool = False
    tensors: Mapping[str, str] = field(
        default_factory=lambda: {
            "embed": "model.embed_tokens.weight",
            "norm": "model.norm.weight",
            "head": "lm_head.weight",
            "layer": "model.layers.{i}.",
        }
    )


def lacks(what: str) -> Callable[[Any], str | None]:
    """Return a ``native`` function for a family whose models all have ``what``."""
    return lambda config: what


def refuse(family: str, what: str, missing: str, remedy: str = "convert a model without it") -> TransmlaError:
    """Return the error that ``family`` has the unsupported feature ``what``; ``missing`` is the reason."""
    return TransmlaError(f"{family}: {what}", limit=missing, remedy=remedy)


def llama_gap(config: Any) -> str | None:
    """Name the feature of a Llama-like ``config`` that a dense DeepSeek-V3 cannot store, or return None."""
    for bias in ("attention_bias", "mlp_bias"):
        if getattr(config, bias, False):
            return bias
    if config.rms_norm_eps > LARGEST_EPS:
        return f"rms_norm_eps {config.rms_norm_eps:g}"
    rope = config.rope_parameters or {}
    if rope.get("rope_type") == "longrope":
        return "longrope"
    if rope.get("rope_type") == "yarn" and rope.get("mscale_all_dim"):
        return "yarn with mscale_all_dim"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "partial_rotary_factor"
    return None


# Largest eps of a norm that a factor on the norm's weight turns into DeepSeek-V3's 1e-6. Larger ones change tokens of
# small hidden states by more than others. All Llama and Mistral models have 1e-5 or 1e-6.
LARGEST_EPS = 1e-5


# Settings that most families' tiny configs share.
TINY = {
    "vocab_size": 128,
    "hidden_size": 72,  # divisible by 4, 6 and 9 heads
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
TINY_WINDOW = 8
TINY_WINDOWS = {"sliding_window": TINY_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
TINY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
