"""What a family tells the rest of the project, and the refusals they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transmla.errors import TransmlaError

# Rotary scalings that do not change with every length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def check_common(config: Any) -> None:
    """Refuse what neither format can carry, by name.

    Raises:
        TransmlaError: naming the attribute, what is missing for it, and the remedy.
    """
    name = config.model_type
    quantisation = getattr(config, "quantization_config", None)
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if method not in (None, "gguf"):
        raise refuse(
            name,
            f"{method} weights are not supported",
            "factors are computed from float32, float16 or bfloat16",
            "convert the unquantised checkpoint",
        )
    for table in rope_tables(config):
        rope_type = table.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            # Up to there dynamic changes nothing.
            short = "if texts fit max_position_embeddings, set rope_type 'default' in its config.json"
            remedy = {"remedy": short} if rope_type == "dynamic" else {}
            limit = f"supported: {', '.join(ROPE_TYPES)}"
            raise refuse(name, f"rope_type '{rope_type}' is not supported", limit, **remedy)
    if config.num_attention_heads % config.num_key_value_heads:
        raise refuse(
            name,
            f"{config.num_attention_heads} query heads do not divide over {config.num_key_value_heads} key heads",
            "the number of query heads must be a multiple of the number of key/value heads",
            "check config.json",
        )


def rope_tables(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of ``config``: one, or one for each kind of layer."""
    rope = config.rope_parameters or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)]
    return kinds or [rope]


@dataclass(frozen=True)
class Family:
    """One model family, keyed by the ``model_type`` of its Hugging Face config.

    ``native(config)`` names what DeepSeek-V3's format has no place for, or is None. ``check(config)`` refuses by name
    what no format can carry. The stream after the attention enters the layer's module ``after_attention``;
    ``interleaved`` rotary channels stand beside their partners. ``tensors`` maps a role to the checkpoint's tensor
    name, ``{i}`` for the layer. ``tiny`` is a config for tests, small enough to build in milliseconds, ``models`` its
    entry in the support table.
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
    """For a family that always has ``what`` DeepSeek-V3's format has no place for."""
    return lambda config: what


def refuse(family: str, what: str, missing: str, remedy: str = "convert a model without it") -> TransmlaError:
    """The error for a feature that cannot be carried."""
    return TransmlaError(f"{family}: {what}", limit=missing, remedy=remedy)


def llama_gap(config: Any) -> str | None:
    """What of a Llama-like ``config`` a dense DeepSeek-V3 cannot express."""
    for bias in ("attention_bias", "mlp_bias"):
        if getattr(config, bias, False):
            return bias
    rope = config.rope_parameters or {}
    if rope.get("rope_type") == "longrope":
        return "longrope"
    if rope.get("rope_type") == "yarn" and rope.get("mscale_all_dim"):
        return "yarn with mscale_all_dim"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "partial_rotary_factor"
    return None


# What the tiny configs of most families share.
TINY = {
    "vocab_size": 128,
    "hidden_size": 72,  # a multiple of 4, 6 and 9 heads
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
