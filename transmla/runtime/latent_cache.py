"""Cache layer that appends new rows in place. transformers' ``DynamicLayer`` copies all rows for every new token."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from transmla.ranks import Ranks
from transmla.runtime.packed_rows import pack, unpack, widened
from transmla.runtime.packed_static import PackedStaticLayer

# Growth of a full buffer, in tokens of each sequence: the largest of STEP, an eighth of the cached rows, and BATCH_STEP
# divided by the number of sequences; rounded up to pages of PAGE tokens. Some kernels read only whole pages. A CUDA
# graph of the decode step is captured anew for each buffer, which BATCH_STEP makes rare where rows are few.
STEP, BATCH_STEP, PAGE = 256, 4096, 64


class LatentLayer(DynamicLayer):
    """Rows [kv_c | k_pe] of one layer, in a buffer [B, 1, capacity, r + d_r] that has spare rows.

    ``keys`` [B, 1, T, r] and ``values`` [B, 1, T, d_r] are views of the first T rows. Everything that transformers does
    with a layer (beams, cropping, selecting sequences) therefore works. If transformers replaces ``keys`` and
    ``values``, the next update copies them into a new buffer.

    Attributes:
        rows: the buffer, or None before the first update.
        ranks: the processes that share the rows; only this one, unless a subclass says otherwise.
        packed: whether rows are bytes from ``packed_rows.pack``. Then ``keys`` is [B, 1, T, row_bytes] and ``values``
            is [B, 1, T, 0].
        pe_dtype: dtype of the rotary keys inside packed rows; None before the first packed row.
    """

    # Number of rows in the buffer that the views do not yet show: ``advance`` costs no slicing.
    _appended = 0
    _keys: Tensor | None = None
    _values: Tensor | None = None
    ranks = Ranks()

    def __init__(self, *, packed: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows: Tensor | None = None
        self.packed = packed
        self.pe_dtype: torch.dtype | None = None

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
        if torch.is_grad_enabled() and self._needs_grad(key_states, value_states):
            # An update in place would change tensors that the autograd graph has saved.
            self._unpack(key_states.shape[-1], value_states.shape[-1])
            return super().update(key_states, value_states, *args, **kwargs)
        if self.packed:
            key_states, value_states = self._packed(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cached = self.own_length()
        total, rank = cached + key_states.shape[-2], key_states.shape[-1]
        rows = self._buffer(cached, total, key_states, value_states)
        rows[..., cached:total, :rank].copy_(key_states)
        rows[..., cached:total, rank:].copy_(value_states)
        self.keys, self.values = rows[..., :total, :rank], rows[..., :total, rank:]
        return self.keys, self.values

    @property
    def keys(self) -> Tensor | None:
        """Latents [B, 1, T, r], or packed rows."""
        self._show()
        return self._keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._show()
        self._keys = keys

    @property
    def values(self) -> Tensor | None:
        """Rotary keys [B, 1, T, d_r]."""
        self._show()
        return self._values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._show()
        self._values = values

    def own_length(self) -> int:
        """Return the number of rows T in the buffer, without a shared prefix."""
        if self._keys is None or not self._keys.numel():
            return 0
        return self._keys.shape[-2] + self._appended

    def get_seq_length(self) -> int:
        """Return the number of cached tokens of a sequence."""
        return self.own_length()

    def has_room(self, new: int) -> bool:
        """Return whether a decode step may write ``new`` rows behind the others, into the buffer that exists."""
        rows, keys = self.rows, self._keys
        return (
            rows is not None
            and keys is not None
            and keys.data_ptr() == rows.data_ptr()
            and keys.dtype == rows.dtype
            and self.packed == (keys.dtype == torch.uint8)
            and keys.shape[0] == rows.shape[0]
            and 0 < self.own_length() <= rows.shape[2] - new
            and torch.is_inference_mode_enabled() == rows.is_inference()
        )

    def reserve(self, new: int, device: torch.device) -> bool:
        """Grow the buffer on ``device`` for ``new`` rows if it is full, and return whether it has room."""
        cached = self.own_length()
        if cached and not self.has_room(new):
            keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
            if keys.device == device and self.packed == (keys.dtype == torch.uint8):
                rows, rank = self._buffer(cached, cached + new, keys, values), keys.shape[-1]
                self.keys, self.values = rows[..., :cached, :rank], rows[..., :cached, rank:]
        return self.has_room(new)

    def buffer(self) -> Tensor:
        """Return ``rows``, which exist if ``has_room``."""
        return cast(Tensor, self.rows)

    def advance(self, new: int) -> None:
        """Count ``new`` rows that were written to the buffer behind the others."""
        self._appended += new

    def _show(self) -> None:
        """Make ``keys`` and ``values`` show all rows of the buffer that ``advance`` counted."""
        if self._appended:
            total, rank = self.own_length(), cast(Tensor, self._keys).shape[-1]
            self._appended = 0
            rows = self.buffer()
            self._keys, self._values = rows[..., :total, :rank], rows[..., :total, rank:]

    def offload(self) -> None:
        """Move ``keys`` and ``values`` to the CPU and release the buffer."""
        super().offload()
        self.rows = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the sequences for beam search, in place: a graph of the decode step knows this buffer."""
        rows = self.rows
        if rows is None or len(beam_idx) != rows.shape[0] or not (self.own_length() and self._writable(rows)):
            super().reorder_cache(beam_idx)
            return
        used = rows[..., : self.own_length(), :]
        used.copy_(used.index_select(0, beam_idx.to(rows.device)))

    def reset(self) -> None:
        """Remove all rows and release the buffer."""
        # transformers 5.17 would keep rows of zeros.
        self.rows = self.keys = self.values = self.pe_dtype = None
        self.is_initialized = False
        super().reset()

    def _needs_grad(self, *new: Tensor) -> bool:
        """Whether the new rows or the cached rows belong to an autograd graph."""
        return any(rows.requires_grad for rows in (*new, self.keys, self.values) if rows is not None)

    def _packed(self, kv_c: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Pack new rows; rows that an autograd graph left unpacked are packed as well.

        Rows that autocast has filled have narrower rotary keys than those without it. They are widened, as plain rows
        are.
        """
        before, wider = self.pe_dtype, torch.promote_types(self.pe_dtype or k_pe.dtype, k_pe.dtype)
        self.pe_dtype = wider
        if before is not None and before != wider:
            self._show()
            # Its rows have another width. A graph of the decode step may know it, even if it holds no row.
            self.rows = None
        if self.is_initialized and self.own_length():
            keys = cast(Tensor, self.keys)
            if keys.dtype != torch.uint8:
                self.keys, self.values = self._pack(keys, cast(Tensor, self.values))
            elif before is not None and before != wider:
                self.keys = rows = widened(keys, kv_c.shape[-1], k_pe.shape[-1], before, wider)
                self.values = rows[..., :0]
        return self._pack(kv_c, k_pe)

    def _pack(self, kv_c: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Pack rows [.., r] and [.., d_r] to bytes [.., row_bytes] and [.., 0]."""
        self.pe_dtype = self.pe_dtype or k_pe.dtype
        rows = pack(kv_c, k_pe.to(self.pe_dtype))
        return rows, rows[..., :0]

    def _unpack(self, rank: int, width: int) -> None:
        """Replace packed rows by latents of width ``rank`` and rotary keys of ``width``."""
        if self.is_initialized and self.own_length() and cast(Tensor, self.keys).dtype == torch.uint8:
            rows = unpack(cast(Tensor, self.keys), rank, width, cast(torch.dtype, self.pe_dtype))
            self.keys, self.values = rows.full()

    def _buffer(self, cached: int, total: int, kv_c: Tensor, k_pe: Tensor) -> Tensor:
        """Return a buffer for ``total`` rows whose first ``cached`` rows are ``keys`` and ``values``."""
        rows, keys, values = self.rows, cast(Tensor, self.keys), cast(Tensor, self.values)
        if rows is not None and rows.shape[2] >= total and self._current(rows, cached, kv_c, k_pe):
            return rows
        batch, rank, width = kv_c.shape[0], kv_c.shape[-1], kv_c.shape[-1] + k_pe.shape[-1]
        pages = -(-(total + max(STEP, total // 8, BATCH_STEP // batch)) // PAGE)
        dtype = torch.promote_types(kv_c.dtype, k_pe.dtype)
        if cached:
            dtype = torch.promote_types(dtype, torch.promote_types(keys.dtype, values.dtype))
        rows = kv_c.new_empty(batch, 1, pages * PAGE, width, dtype=dtype)
        if cached:
            rows[..., :cached, :rank].copy_(keys)
            rows[..., :cached, rank:].copy_(values)
        self.rows = rows
        return rows

    def _current(self, rows: Tensor, cached: int, kv_c: Tensor, k_pe: Tensor) -> bool:
        """Whether ``rows`` holds the ``cached`` rows, and the new rows may be written to it without a loss."""
        if not (self._writable(rows) if cached else _may_change(rows)):
            return False
        fits = rows.shape[0] == kv_c.shape[0] and rows.device == kv_c.device
        return fits and _holds(rows.dtype, kv_c.dtype) and _holds(rows.dtype, k_pe.dtype)

    def _writable(self, rows: Tensor) -> bool:
        """Whether ``keys`` and ``values`` show ``rows``, and ``rows`` may be changed."""
        return cast(Tensor, self._keys).data_ptr() == rows.data_ptr() and _may_change(rows)


def _may_change(rows: Tensor) -> bool:
    """Whether ``rows`` may be changed: outside of inference mode, not if they were made in it."""
    return torch.is_inference_mode_enabled() or not rows.is_inference()


def _holds(wide: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether ``wide`` represents every value of ``dtype``."""
    return wide == dtype or torch.promote_types(wide, dtype) == wide


def grow_in_place(cache: Cache | None, layer: int, *, packed: bool = False) -> LatentLayer | PackedStaticLayer | None:
    """Replace one layer of a dynamic ``cache`` by a ``LatentLayer`` with the same rows.

    If rows are to be packed, a layer of a static cache is replaced as well. Other layers are not changed.

    Args:
        cache: the cache of a model, or None.
        layer: index of the layer.
        packed: whether the layer stores latents as float8.

    Returns:
        The layer of ``runtime`` with index ``layer``, or None if it has another class or is yet to be made.

    Raises:
        ValueError: if ``packed`` and the layer has a class that cannot store float8 latents.
    """
    layers: list[Any] = getattr(cache, "layers", [])
    if layer >= len(layers):
        return None
    current = layers[layer]
    if isinstance(current, LatentLayer | PackedStaticLayer):
        return current
    if type(current) is DynamicLayer:
        keys, values = cast(Tensor, current.keys), cast(Tensor, current.values)
        latent = LatentLayer(packed=packed)
        if current.is_initialized and packed:
            latent.update(keys, values)
        elif current.is_initialized:
            latent.lazy_initialization(keys, values)
            latent.keys, latent.values = keys, values
        layers[layer] = latent
        return latent
    if packed and type(current) is StaticLayer:
        layers[layer] = static = PackedStaticLayer.of(current)
        return static
    if packed:
        raise ValueError(
            f"a {type(current).__name__} cannot hold float8 rows, only dynamic and static caches can; leave out "
            "cache_implementation, or load the model without cache_dtype"
        )
    return None


def make_room(cache: Cache, new: int, device: torch.device, *, packed: bool = False) -> bool:
    """Give every layer of a dynamic ``cache`` a buffer on ``device`` with room for ``new`` rows, ``packed`` or plain.

    Returns:
        Whether all layers have one.
    """
    layers = (grow_in_place(cache, i, packed=packed) for i in range(len(cache.layers)))
    return all(isinstance(layer, LatentLayer) and layer.reserve(new, device) for layer in layers)


def latent_bytes(cache: Cache) -> int:
    """Return the bytes of all cached rows; spare rows of the buffers do not count."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
