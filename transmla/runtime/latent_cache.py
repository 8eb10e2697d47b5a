"""A latent cache with room to grow: transformers' own layer copies everything it holds for every new token."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from transmla.runtime.packed_rows import pack

# New room is asked for in steps of so many tokens, or of an eighth of what is held, and in whole pages: there are
# kernels that read nothing else.
STEP, PAGE = 256, 64


class LatentLayer(DynamicLayer):
    """Rows [kv_c | k_pe] of one layer in one buffer [B, 1, room, r + d_r].

    ``keys`` [B, 1, T, r] and ``values`` [B, 1, T, d_r] are views of its first T rows, so everything transformers does
    with a layer (beams, cropping, selecting sequences) works as before; what it replaces is copied once. ``packed``
    rows are bytes (``float8.pack``): then ``keys`` are these, and ``values`` have no columns.
    """

    def __init__(self, *, packed: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows: Tensor | None = None
        self.packed = packed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``key_states`` [B, 1, n, r] (kv_c) and ``value_states`` [B, 1, n, d_r] (k_pe); returns all."""
        if key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)  # a graph must not see its past change
        if self.packed:
            key_states = pack(key_states, value_states)
            value_states = key_states[..., :0]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.own_length()
        total, rank = held + key_states.shape[-2], key_states.shape[-1]
        rows = self._room(held, total, key_states, value_states)
        rows[..., held:total, :rank].copy_(key_states)
        rows[..., held:total, rank:].copy_(value_states)
        self.keys, self.values = rows[..., :total, :rank], rows[..., :total, rank:]
        return self.keys, self.values

    def own_length(self) -> int:
        """Rows in the buffer."""
        return super().get_seq_length()

    def offload(self) -> None:
        """Move what is held to the CPU; the buffer is let go."""
        super().offload()
        self.rows = None

    def reset(self) -> None:
        """Forget everything."""
        self.rows = None
        super().reset()

    def _room(self, held: int, total: int, kv_c: Tensor, k_pe: Tensor) -> Tensor:
        """A buffer for ``total`` rows whose first ``held`` are those cached."""
        rows, keys, values = self.rows, cast(Tensor, self.keys), cast(Tensor, self.values)
        ours = not held or (rows is not None and keys.data_ptr() == rows.data_ptr())
        if rows is not None and ours and rows.shape[0] == kv_c.shape[0] and rows.shape[2] >= total:
            return rows
        batch, rank, width = kv_c.shape[0], kv_c.shape[-1], kv_c.shape[-1] + k_pe.shape[-1]
        pages = -(-(total + max(STEP, total // 8)) // PAGE)
        rows = kv_c.new_empty(batch, 1, pages * PAGE, width)
        if held:
            rows[..., :held, :rank].copy_(keys)
            rows[..., :held, rank:].copy_(values)
        self.rows = rows
        return rows


def grow_in_place(cache: Cache | None, layer: int, *, packed: bool = False) -> None:
    """Let ``layer`` of a dynamic ``cache`` grow without copying; other kinds of cache stay as they are.

    Raises:
        ValueError: if rows are to be ``packed`` in a cache of another kind.
    """
    layers = getattr(cache, "layers", [])
    if layer >= len(layers):
        return
    if type(layers[layer]) is DynamicLayer:
        plain, roomy = layers[layer], LatentLayer(packed=packed)
        if plain.is_initialized and packed:
            roomy.update(plain.keys, plain.values)
        elif plain.is_initialized:
            roomy.lazy_initialization(plain.keys, plain.values)
            roomy.keys, roomy.values = plain.keys, plain.values
        layers[layer] = roomy
    elif packed and not isinstance(layers[layer], LatentLayer):
        raise ValueError(
            f"a {type(layers[layer]).__name__} cannot hold rows of 8 bits, only caches that grow can; leave out "
            "cache_implementation, or load the model without cache_dtype"
        )


def latent_bytes(cache: Cache) -> int:
    """Bytes of the rows that a cache holds, its spare room left out."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
