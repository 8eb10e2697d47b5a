"""The rotary table that runtimes compute from a DeepSeek-V3 config, matched to the source's frequencies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import AttentionSpec
from transmla.core.rope import match_slots
from transmla.errors import TransmlaError


def choose_slots(spec: AttentionSpec, width: int, *, custom: bool) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Choose the source frequency of every rotary slot.

    Args:
        spec: the source's attention, with p rotary frequencies.
        width: width d_r of the rotary key.
        custom: allow a ``width`` that repeats every source frequency, in a table that only transformers reads.

    Returns:
        The indices [d_r/2] into the source's frequencies, and the config's ``rope_parameters`` for this table.

    Raises:
        TransmlaError: if the width is odd, or if the runtime's table for this width is not a subset of the source's.
    """
    source = torch.tensor(spec.inv_freq, dtype=torch.float64)
    if width % 2:
        raise TransmlaError(
            f"qk_rope_head_dim {width} is odd",
            limit="rotary channels come in pairs",
            remedy=f"use an even divisor of {spec.head_dim}",
        )
    if custom and width > spec.head_dim and width % spec.head_dim == 0:
        slots = tuple(i for i in range(len(source)) for _ in range(width // spec.head_dim))
        return slots, custom_table(spec, source[list(slots)])
    matched = native_slots(spec, width)
    if matched is None:
        rope_type = spec.rope_parameters.get("rope_type", "default")
        divisors = [w for w in range(spec.head_dim, 1, -1) if w % 2 == 0 and spec.head_dim % w == 0]
        widths = ", ".join(str(w) for w in divisors if native_slots(spec, w) is not None)
        raise TransmlaError(
            f"qk_rope_head_dim {width} gives rotary frequencies the source does not have",
            limit=f"a runtime computes the frequencies from this width; with rope_type '{rope_type}' and head width "
            f"{spec.head_dim} only {'the full width matches' if rope_type == 'yarn' else 'divisors match'}",
            remedy=f"use {spec.head_dim}" if rope_type == "yarn" else f"use one of {widths or divisors}",
        )
    return matched, dict(spec.rope_parameters)


def native_slots(spec: AttentionSpec, width: int) -> tuple[int, ...] | None:
    """Return the source index [width/2] of every frequency in the runtime's table; None if one has no match."""
    table, factor = rotary_table(spec, width, spec.rope_parameters)
    if abs(factor - spec.attention_factor) > 1e-6:
        return None
    return match_slots(table, torch.tensor(spec.inv_freq, dtype=torch.float64))


def rotary_table(spec: AttentionSpec, width: int, rope_parameters: dict[str, Any]) -> tuple[Tensor, float]:
    """Return (inv_freq [width/2] float64, attention factor) as transformers' DeepSeek-V3 computes them."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    config = DeepseekV3Config(
        qk_rope_head_dim=width,
        max_position_embeddings=spec.max_position_embeddings,
        rope_parameters=dict(rope_parameters),
    )
    rotary = DeepseekV3RotaryEmbedding(config)
    return rotary.inv_freq.double(), float(rotary.attention_scaling)


def custom_table(spec: AttentionSpec, inv_freq: Tensor) -> dict[str, Any]:
    """Return ``rope_parameters`` with which transformers uses ``inv_freq`` [d_r/2], by way of ``longrope`` factors."""
    theta = float(spec.rope_parameters["rope_theta"])
    count = len(inv_freq)
    plain = theta ** (-torch.arange(count, dtype=torch.float64) / count)
    factors = (plain / inv_freq).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": 1.0,
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": spec.attention_factor,
        "original_max_position_embeddings": spec.max_position_embeddings,
    }
