"""What decoding reads: the rows of a latent cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Latents kv_c [B, T, r] and rotary keys k_pe [B, T, d_r] of every sequence.

    ``scale`` [B, T]: kv_c is e4m3, and each of its rows counts times its scale. ``lengths`` [B]: rows that each
    sequence has, of T. ``block_table`` [B, pages]: rows lie in pages that all sequences share, [all pages, page, ·]
    (and ``scale`` [all pages, page]); page j of sequence b is block_table[b, j]; needs ``lengths``. Lengths and pages
    are integers of any width.
    """

    kv_c: Tensor
    k_pe: Tensor
    scale: Tensor | None = None
    lengths: Tensor | None = None
    block_table: Tensor | None = None

    @property
    def page(self) -> int:
        """Rows of a page; 0 if there are none."""
        return 0 if self.block_table is None else self.kv_c.shape[1]

    @property
    def total(self) -> int:
        """T."""
        return self.kv_c.shape[1] if self.block_table is None else self.block_table.shape[1] * self.page

    def full(self) -> tuple[Tensor, Tensor]:
        """kv_c and k_pe in the dtype of k_pe."""
        if self.scale is None:
            return self.kv_c, self.k_pe
        wide = torch.promote_types(self.k_pe.dtype, torch.float32)
        return (self.kv_c.to(wide) * self.scale[..., None]).to(self.k_pe.dtype), self.k_pe
