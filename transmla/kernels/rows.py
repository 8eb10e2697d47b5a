"""What decoding reads: the rows of a latent cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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

    def __post_init__(self) -> None:
        if self.block_table is not None and self.lengths is None:
            raise ValueError("rows in pages need lengths")

    def paged(self, size: int) -> Rows | None:
        """The same rows as pages of ``size``, or None if they do not lie so, or have scales.

        Sequences that lie apart are whole buffers of pages, as ``LatentLayer`` has them: what lies behind T is read
        as the end of the last page. The result has lengths, all T if there were none: what was all to be seen is then
        causal, unless its reader says otherwise.
        """
        if self.scale is not None:
            return None
        if self.block_table is not None:
            return self if self.page == size else None
        batch, total = self.kv_c.shape[:2]
        room = self.kv_c.stride(0) // max(self.kv_c.stride(1), 1)
        count = batch * room // size
        parts = []
        for part in (self.kv_c, self.k_pe):
            apart, width = part.stride(1), part.shape[2]
            end = part.storage_offset() + (count * size - 1) * apart + width
            held = part.untyped_storage().nbytes() // part.element_size()
            whole = room >= total and room % size == 0 and part.stride(0) == room * apart and part.stride(2) == 1
            if not whole or end > held:
                return None
            parts.append(part.as_strided((count, size, width), (size * apart, apart, 1)))
        kv_c, k_pe = parts
        device = self.kv_c.device
        table = torch.arange(count, dtype=torch.int32, device=device).view(batch, -1)
        lengths = self.lengths
        if lengths is None:
            lengths = torch.full((batch,), total, dtype=torch.int32, device=device)
        return Rows(kv_c, k_pe, None, lengths, table)


@dataclass(frozen=True)
class Scores:
    """How scores q · k are made and which of them count.

    Attributes:
        scaling: factor on all scores.
        mask: boolean, broadcastable to [B, 1, n, T]; True where a query may look. None: everywhere.
        softcap: scores s become softcap · tanh(s / softcap).
    """

    scaling: float
    mask: Tensor | None = None
    softcap: float | None = None


class Decode(Protocol):
    """Attention of n new tokens of every sequence to the cached rows."""

    def __call__(self, q_latent: Tensor, q_pe: Tensor, rows: Rows, scores: Scores) -> tuple[Tensor, Tensor]:
        """Attend with ``q_latent`` [B, n, H, r] and ``q_pe`` [B, n, H, d_r] to ``rows``.

        Where ``rows`` has lengths, the new tokens are the last of each sequence, and each sees the rows up to itself.

        Returns:
            The mean of the latents under the attention [B, n, H, r], and the log-sum-exp of the scores [B, n, H].
        """
        ...
