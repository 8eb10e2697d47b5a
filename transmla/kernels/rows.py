"""Rows of a latent cache, settings of the attention scores, and the signature of a decode function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Cached rows of all sequences: latents and rotary keys, contiguous per sequence or in pages.

    Lengths and page numbers may be integers of any width.

    Attributes:
        kv_c: latents [B, T, r]; with a block table [all pages, page, r].
        k_pe: rotary keys [B, T, d_r]; with a block table [all pages, page, d_r].
        scale: factor of each latent, [B, T] or [all pages, page]; then ``kv_c`` is float8 e4m3. None: no factor.
        lengths: number of valid rows of each sequence [B], at most T. None: all T rows are valid. Lengths with stride
            0 are known to be equal, which saves the Hopper kernel a division of the batch.
        block_table: page numbers [B, pages]; page j of sequence b is ``block_table[b, j]``. None: no pages.

    Raises:
        ValueError: if there is a block table without lengths.
    """

    kv_c: Tensor
    k_pe: Tensor
    scale: Tensor | None = None
    lengths: Tensor | None = None
    block_table: Tensor | None = None

    @property
    def page(self) -> int:
        """Number of rows in a page; 0 without a block table."""
        return 0 if self.block_table is None else self.kv_c.shape[1]

    @property
    def total(self) -> int:
        """Number of rows T of a sequence; with pages, the rows of all pages in its block table."""
        return self.kv_c.shape[1] if self.block_table is None else self.block_table.shape[1] * self.page

    def full(self) -> tuple[Tensor, Tensor]:
        """Return ``kv_c``, multiplied by ``scale``, and ``k_pe``: both in the dtype of ``k_pe``, shapes as stored."""
        if self.scale is None:
            return self.kv_c, self.k_pe
        wide = torch.promote_types(self.k_pe.dtype, torch.float32)
        return (self.kv_c.to(wide) * self.scale[..., None]).to(self.k_pe.dtype), self.k_pe

    def first(self, count: int) -> Rows:
        """Return the first ``count`` rows of each sequence, or all if there are fewer; for rows without pages."""
        if self.total <= count:
            return self
        scale = None if self.scale is None else self.scale[:, :count]
        return replace(self, kv_c=self.kv_c[:, :count], k_pe=self.k_pe[:, :count], scale=scale)

    def __post_init__(self) -> None:
        if self.block_table is not None and self.lengths is None:
            raise ValueError("rows in pages need lengths")

    def paged(self, size: int) -> Rows | None:
        """Return a view of the same memory as pages of ``size`` rows.

        A sequence can be viewed so if its buffer consists of whole pages, as the buffers of ``LatentLayer`` do.
        Memory behind row T then counts as the end of the last page.

        The result always has lengths: T for every sequence if there were none. A kernel that treats lengths as causal
        must therefore check ``self.lengths``, because rows without lengths are visible to every new token.

        Returns:
            Rows with kv_c [pages, size, r], k_pe [pages, size, d_r], lengths [B] and a block table; None if the memory
            has another layout, or if the rows have scales.
        """
        if self.scale is not None:
            return None
        if self.block_table is not None:
            return self if self.page == size else None
        batch, total = self.kv_c.shape[:2]
        capacity = self.kv_c.stride(0) // max(self.kv_c.stride(1), 1)
        count = batch * capacity // size
        parts = []
        for part in (self.kv_c, self.k_pe):
            row_stride, width = part.stride(1), part.shape[2]
            end = part.storage_offset() + (count * size - 1) * row_stride + width
            allocated = part.untyped_storage().nbytes() // part.element_size()
            whole_pages = capacity >= total and capacity % size == 0 and part.stride(0) == capacity * row_stride
            if not whole_pages or part.stride(2) != 1 or end > allocated:
                return None
            parts.append(part.as_strided((count, size, width), (size * row_stride, row_stride, 1)))
        kv_c, k_pe = parts
        device = self.kv_c.device
        table = torch.arange(count, dtype=torch.int32, device=device).view(batch, -1)
        lengths = self.lengths
        if lengths is None:
            lengths = torch.full((batch,), total, dtype=torch.int32, device=device)
        return Rows(kv_c, k_pe, None, lengths, table)


@dataclass(frozen=True)
class Scores:
    """Settings of the scores s = scaling · (q · k) and their mask.

    Attributes:
        scaling: factor on all scores.
        mask: boolean, broadcastable to [B, 1, n, T]; True where a query may attend. None: everywhere.
        softcap: scores s become softcap · tanh(s / softcap). None: no cap.
    """

    scaling: float
    mask: Tensor | None = None
    softcap: float | None = None


class Decode(Protocol):
    """Attention of n new tokens of every sequence to the cached rows."""

    def __call__(self, q_latent: Tensor, q_pe: Tensor, rows: Rows, scores: Scores) -> tuple[Tensor, Tensor]:
        """Attend with ``q_latent`` [B, n, H, r] and ``q_pe`` [B, n, H, d_r] to ``rows``.

        With lengths, the new tokens are the last rows of each sequence, and each attends to the rows up to itself.
        Without lengths, every new token attends to all T rows that the mask admits.

        Returns:
            The latents averaged with the attention weights [B, n, H, r], and the log-sum-exp of the scores [B, n, H],
            to base e. A token that may attend to no row gets a log-sum-exp of minus infinity.
        """
        ...
