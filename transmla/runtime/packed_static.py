"""Static cache layer that stores packed rows: latents as float8, one scale per token, and rotary keys."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from transmla.runtime.packed_rows import pack, widened


class PackedStaticLayer(StaticLayer):
    """Bytes ``keys`` [B, 1, capacity, row_bytes] from ``packed_rows.pack``; ``values`` is [B, 1, capacity, 0].

    Attributes:
        pe_dtype: dtype of the rotary keys inside the rows; None before the first row.
    """

    pe_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, layer: StaticLayer) -> PackedStaticLayer:
        """Return a layer with the rows of ``layer``, which is still empty or holds plain rows."""
        packed = cls(layer.max_cache_len)
        if layer.is_initialized:
            keys, values = cast(Tensor, layer.keys), cast(Tensor, layer.values)
            packed.lazy_initialization(keys, values)
            cast(Tensor, packed.keys).copy_(packed._pack(keys, values)[0])
            packed.cumulative_length.copy_(layer.cumulative_length)
        return packed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffer for rows like these: packed ones, or latents [B, 1, n, r] and keys [B, 1, n, d_r]."""
        if key_states.dtype != torch.uint8:
            key_states, value_states = self._pack(key_states, value_states)
        super().lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Pack and write latents [B, 1, n, r] and rotary keys [B, 1, n, d_r]; return both parts of the whole buffer.

        A buffer whose rotary keys are narrower, because autocast has filled it, is replaced by a wider one.
        """
        before, wider = self.pe_dtype, torch.promote_types(self.pe_dtype or value_states.dtype, value_states.dtype)
        if self.is_initialized and before is not None and before != wider:
            self.pe_dtype, sizes = wider, (key_states.shape[-1], value_states.shape[-1])
            self.keys = rows = widened(cast(Tensor, self.keys), *sizes, before, wider)
            self.values = rows[..., :0]
        return super().update(*self._pack(key_states, value_states), *args, **kwargs)

    def _pack(self, kv_c: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        self.pe_dtype = self.pe_dtype or k_pe.dtype
        rows = pack(kv_c, k_pe.to(self.pe_dtype))
        return rows, rows[..., :0]
