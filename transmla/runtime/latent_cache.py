"""Cache layer that appends new rows in place. transformers' ``DynamicLayer`` copies all rows for every new token."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from transmla.runtime.packed_rows import pack

# Growth of a full buffer, in tokens: STEP, or an eighth of the cached rows if that is more, rounded up to pages of
# PAGE tokens. Some kernels read only whole pages.
STEP, PAGE = 256, 64


class LatentLayer(DynamicLayer):
    """Rows [kv_c | k_pe] of one layer, in a buffer [B, 1, capacity, r + d_r] that has spare rows.

    ``keys`` [B, 1, T, r] and ``values`` [B, 1, T, d_r] are views of the first T rows. Everything that transformers does
    with a layer (beams, cropping, selecting sequences) therefore works. If transformers replaces ``keys`` and
    ``values``, the next update copies them into a new buffer.

    Attributes:
        rows: the buffer, or None before the first update.
        packed: whether rows are bytes from ``packed_rows.pack``. Then ``keys`` is [B, 1, T, row_bytes] and ``values``
            is [B, 1, T, 0].
    """

    def __init__(self, *, packed: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows: Tensor | None = None
        self.packed = packed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new rows and return all rows.

        Args:
            key_states: latents kv_c [B, 1, n, r].
            value_states: rotary keys k_pe [B, 1, n, d_r].
            args: passed on to ``DynamicLayer.update``.
            kwargs: passed on to ``DynamicLayer.update``.

        Returns:
            ``keys`` and ``values`` of all T rows.
        """
        if key_states.requires_grad or value_states.requires_grad:
            # An update in place would change tensors that the autograd graph has saved.
            return super().update(key_states, value_states, *args, **kwargs)
        if self.packed:
            key_states = pack(key_states, value_states)
            value_states = key_states[..., :0]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cached = self.own_length()
        total, rank = cached + key_states.shape[-2], key_states.shape[-1]
        rows = self._buffer(cached, total, key_states, value_states)
        rows[..., cached:total, :rank].copy_(key_states)
        rows[..., cached:total, rank:].copy_(value_states)
        self.keys, self.values = rows[..., :total, :rank], rows[..., :total, rank:]
        return self.keys, self.values

    def own_length(self) -> int:
        """Return the number of rows T in the buffer, without a shared prefix."""
        return super().get_seq_length()

    def offload(self) -> None:
        """Move ``keys`` and ``values`` to the CPU and release the buffer."""
        super().offload()
        self.rows = None

    def reset(self) -> None:
        """Remove all rows and release the buffer."""
        self.rows = None
        super().reset()

    def _buffer(self, cached: int, total: int, kv_c: Tensor, k_pe: Tensor) -> Tensor:
        """Return a buffer for ``total`` rows whose first ``cached`` rows are ``keys`` and ``values``."""
        rows, keys, values = self.rows, cast(Tensor, self.keys), cast(Tensor, self.values)
        current = not cached or (rows is not None and keys.data_ptr() == rows.data_ptr())
        if rows is not None and current and rows.shape[0] == kv_c.shape[0] and rows.shape[2] >= total:
            return rows
        batch, rank, width = kv_c.shape[0], kv_c.shape[-1], kv_c.shape[-1] + k_pe.shape[-1]
        pages = -(-(total + max(STEP, total // 8)) // PAGE)
        rows = kv_c.new_empty(batch, 1, pages * PAGE, width)
        if cached:
            rows[..., :cached, :rank].copy_(keys)
            rows[..., :cached, rank:].copy_(values)
        self.rows = rows
        return rows


def grow_in_place(cache: Cache | None, layer: int, *, packed: bool = False) -> None:
    """Replace one layer of a dynamic ``cache`` by a ``LatentLayer`` with the same rows.

    Layers of other classes (static, sliding-window) are not changed.

    Args:
        cache: the cache of a model, or None.
        layer: index of the layer.
        packed: whether the layer stores latents as float8.

    Raises:
        ValueError: if ``packed`` and the layer has a class that cannot store float8 latents.
    """
    layers = getattr(cache, "layers", [])
    if layer >= len(layers):
        return
    if type(layers[layer]) is DynamicLayer:
        plain, latent = layers[layer], LatentLayer(packed=packed)
        if plain.is_initialized and packed:
            latent.update(plain.keys, plain.values)
        elif plain.is_initialized:
            latent.lazy_initialization(plain.keys, plain.values)
            latent.keys, latent.values = plain.keys, plain.values
        layers[layer] = latent
    elif packed and not isinstance(layers[layer], LatentLayer):
        raise ValueError(
            f"a {type(layers[layer]).__name__} cannot hold float8 rows, only a dynamic cache can; leave out "
            "cache_implementation, or load the model without cache_dtype"
        )


def latent_bytes(cache: Cache) -> int:
    """Return the bytes of all cached rows; spare rows of the buffers do not count."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
