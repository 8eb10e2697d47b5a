"""What a family tells the rest of the project, and the refusals they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transmla.errors import TransmlaError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Family:
    """One model family, keyed by the ``model_type`` of its Hugging Face config.

    ``check(config)`` refuses by name what the native export cannot carry. ``tensors`` maps a role to the
    checkpoint's tensor name; ``{i}`` stands for the layer. ``tiny`` is a config for tests, small enough to
    build in milliseconds.
    """

    name: str
    check: Callable[[Any], None]
    tiny: Mapping[str, Any]
    tensors: Mapping[str, str] = field(
        default_factory=lambda: {
            "embed": "model.embed_tokens.weight",
            "norm": "model.norm.weight",
            "head": "lm_head.weight",
            "layer": "model.layers.{i}.",
        }
    )


def refuse(family: str, what: str, missing: str, remedy: str = "convert a model without it") -> TransmlaError:
    """The error for a feature the native DeepSeek-V3 format has no place for."""
    return TransmlaError(f"{family}: {what}", limit=missing, remedy=remedy)


def check_llama_like(config: Any) -> None:
    """Refuse biases and rotary scalings that a dense DeepSeek-V3 cannot express.

    Raises:
        TransmlaError: naming the attribute, what the format lacks, and the remedy.
    """
    name = config.model_type
    for bias in ("attention_bias", "mlp_bias"):
        if getattr(config, bias, False):
            raise refuse(name, f"{bias}=true is not supported", "the native format has no slot for these biases")
    quantisation = getattr(config, "quantization_config", None)
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if method not in (None, "gguf"):
        raise refuse(
            name,
            f"{method} weights are not supported",
            "factors are computed from float32, float16 or bfloat16",
            "convert the unquantised checkpoint",
        )
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise refuse(name, f"rope_type '{rope_type}' is not supported", f"supported: {', '.join(ROPE_TYPES)}")
    if rope_type == "yarn" and rope.get("mscale_all_dim"):
        raise refuse(
            name,
            "yarn with mscale_all_dim is not supported",
            "DeepSeek-V3 would scale all scores by it once more",
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(name, "partial_rotary_factor is not supported", "every key channel must be rotary in the source")
    if config.num_attention_heads % config.num_key_value_heads:
        raise refuse(
            name,
            f"{config.num_attention_heads} query heads do not divide over {config.num_key_value_heads} key heads",
            "the number of query heads must be a multiple of the number of key/value heads",
            "check config.json",
        )
