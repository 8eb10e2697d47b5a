"""One width for queries, keys and values, as flash attention requires."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def one_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Give all tensors the largest width, by columns in front of their own.

    The columns are zeros. Those of values may be any numbers instead, because each column of an attention's output is
    computed from the same column of the values.

    Args:
        tensors: heads [B, H, T, ·], of which the last two are keys and values.

    Returns:
        Heads [B, H, T, width]. An attention's output has the output of the given values in its last columns.
    """
    width = max(t.shape[-1] for t in tensors)
    *heads, keys, values = tensors
    if keys.shape[-1] == width and (window := _window(keys, values)) is not None:
        values = window
    return tuple(t if t.shape[-1] == width else pad(t, (width - t.shape[-1], 0)) for t in (*heads, keys, values))


def _window(keys: Tensor, values: Tensor) -> Tensor | None:
    """A view of ``values`` with the width of ``keys``, if both are views of one buffer with rows [key | value].

    The view begins with the last columns of the keys, and costs no copy.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        # A trace would keep these strides for prompts of other lengths.
        return None
    missing = keys.shape[-1] - values.shape[-1]
    if missing <= 0 or not keys.numel() or keys.stride() != values.stride():
        return None
    if keys.stride(-1) != 1 or values.data_ptr() != keys.data_ptr() + keys.shape[-1] * keys.element_size():
        return None
    return values.as_strided(keys.shape, keys.stride(), values.storage_offset() - missing)
