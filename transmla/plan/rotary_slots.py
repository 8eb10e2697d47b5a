"""Which source frequency each rotary slot of an export turns with."""

from __future__ import annotations

from typing import Any

import torch

from transmla.artifacts import AttentionSpec, LayerKind
from transmla.core.methods.base import Method
from transmla.core.rope import match_slots
from transmla.errors import TransmlaError
from transmla.formats.native import custom_table, rotary_table
from transmla.recipe import Recipe


def own_slots(kind: LayerKind, width: int) -> tuple[int, ...]:
    """Source frequency of every rotary slot: evenly spread, or each repeated; the export carries its own table.

    Raises:
        TransmlaError: for a width that is neither.
    """
    count = width // 2
    if width % 2 == 0 and count and kind.turned % count == 0:
        return tuple(range(0, kind.turned, kind.turned // count))
    if width % 2 == 0 and count and count % kind.turned == 0:
        return tuple(i for i in range(kind.turned) for _ in range(count // kind.turned))
    raise TransmlaError(
        f"qk_rope_head_dim {width} does not fit the source's {kind.turned} rotary frequencies",
        limit="they are spread evenly over the rotary key, or all repeated in it",
        remedy=f"use a divisor of {2 * kind.turned} that is even, or a multiple",
    )


def choose_slots(spec: AttentionSpec, width: int, *, custom: bool) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Source frequency of every rotary slot, and the ``rope_parameters`` that make the runtime agree.

    Raises:
        TransmlaError: if the runtime's table for this width is not a subset of the source's.
    """
    source = torch.tensor(spec.inv_freq, dtype=torch.float64)
    if width % 2:
        raise TransmlaError(
            f"qk_rope_head_dim {width} is odd",
            limit="rotary coordinates come in pairs",
            remedy=f"use an even divisor of {spec.head_dim}",
        )
    if custom and width > spec.head_dim and width % spec.head_dim == 0:
        slots = tuple(i for i in range(len(source)) for _ in range(width // spec.head_dim))
        return slots, custom_table(spec, source[list(slots)])
    found = native_slots(spec, width)
    if found is None:
        rope_type = spec.rope_parameters.get("rope_type", "default")
        widths = [w for w in (spec.head_dim // k for k in (1, 2, 4, 8)) if w % 2 == 0]
        raise TransmlaError(
            f"qk_rope_head_dim {width} gives rotary frequencies the source does not have",
            limit=f"a runtime computes its own table; with rope_type '{rope_type}' and head width "
            f"{spec.head_dim} only {'the full width' if rope_type == 'yarn' else 'divisors'} match",
            remedy=f"use {spec.head_dim}" if rope_type == "yarn" else f"use one of {widths}",
        )
    return found, dict(spec.rope_parameters)


def native_slots(spec: AttentionSpec, width: int) -> tuple[int, ...] | None:
    """Source frequency of every slot of the runtime's own table for ``width``, or None if they do not match."""
    table, factor = rotary_table(spec, width, spec.rope_parameters)
    if abs(factor - spec.attention_factor) > 1e-6:
        return None
    return match_slots(table, torch.tensor(spec.inv_freq, dtype=torch.float64))


def choose_fold(recipe: Recipe, method: Method, slots: tuple[int, ...], pairs: int) -> int:
    """How many neighbouring frequencies are concentrated together."""
    stride = max(1, pairs // len(set(slots)))
    repeated = len(set(slots)) < len(slots)
    preferred = 1 if repeated else method.freqfold(stride)
    fold = recipe.freqfold or (stride if pairs % preferred else preferred)
    check_fold(fold, stride, pairs)
    return fold


def check_fold(fold: int, stride: int, pairs: int) -> None:
    """Every fold must hold a slot, and folds must tile the frequencies."""
    if fold % stride or pairs % fold:
        raise TransmlaError(
            f"freqfold {fold} does not fit the source's {pairs} rotary frequencies",
            limit=f"it must be a multiple of {stride} that divides {pairs}",
            remedy="choose another --freqfold, or leave it out",
        )
