"""Cache layer that holds a share of the tokens, while other processes hold the rest (decode context parallelism).

Process k of R caches whole rows of the tokens at positions k, k + R, k + 2R, …, as vLLM and SGLang do. All processes
thus hold equally many rows, up to one. Each attends to its own rows, and the partial results are merged by their
log-sum-exps, as in Helix (arXiv 2507.07120). This is exact, and it divides the rotary keys too. A split of the latent's
columns (TPLA, arXiv 2508.15881) does neither.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from transmla.errors import TransmlaError
from transmla.kernels.rows import Rows
from transmla.ranks import Ranks
from transmla.runtime.latent_cache import LatentLayer, grow_in_place
from transmla.runtime.packed_static import PackedStaticLayer


class SplitLayer(LatentLayer):
    """This process's share of the rows of one layer.

    ``keys`` and ``values`` show the share alone. ``get_seq_length`` counts the tokens of all processes, because masks
    and positions depend on it.

    Attributes:
        ranks: the processes that share the rows.
        divided: whether the last ``update`` returned this process's share instead of all rows.
    """

    def __init__(self, ranks: Ranks, *, packed: bool = False) -> None:
        super().__init__(packed=packed)
        self.ranks = ranks
        self.divided = False
        self._tokens = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append this process's share of new rows.

        Args:
            key_states: latents kv_c [B, 1, n, r] of all n new tokens, the same in all processes.
            value_states: rotary keys k_pe [B, 1, n, d_r] of these tokens.
            args: ignored, as by ``LatentLayer``.
            kwargs: ignored, as by ``LatentLayer``.

        Returns:
            The new rows themselves if they are the first, because every process has just computed them; otherwise
            this process's share of all rows.

        Raises:
            TransmlaError: if gradients are to flow through the rows.
        """
        if torch.is_grad_enabled() and self._needs_grad(key_states, value_states):
            raise TransmlaError(
                "a cache that processes share has no gradients",
                limit="rows of other processes are not part of the autograd graph",
                remedy="call the model under torch.no_grad(), or with use_cache=False",
            )
        first = self._tokens == 0
        own = slice((self.ranks.rank - self._tokens) % self.ranks.size, None, self.ranks.size)
        self._tokens += key_states.shape[-2]
        share = super().update(key_states[:, :, own], value_states[:, :, own], *args, **kwargs)
        self.divided = not first
        if self.divided:
            return share
        return self._pack(key_states, value_states) if self.packed else (key_states, value_states)

    def has_room(self, new: int) -> bool:
        """Return whether a decode step may write ``new`` rows, and leave the last row of the buffer spare.

        All processes get the same answer, because their buffers have one size and a graph is captured by all or none.
        """
        all_hold_rows, most = self._tokens >= self.ranks.size, -(-(self._tokens + new) // self.ranks.size)
        return all_hold_rows and super().has_room(1) and most < self.buffer().shape[2]

    def advance(self, new: int) -> None:
        """Count ``new`` tokens, of which this process's were written to the buffer behind its others."""
        super().advance(self.share_of(self._tokens + new) - self.share_of(self._tokens))
        self._tokens += new

    def adopt(self, keys: Tensor, values: Tensor) -> None:
        """Keep this process's share of the rows ``keys`` [B, 1, T, r] and ``values`` [B, 1, T, d_r] of all tokens."""
        with torch.no_grad():
            self.update(keys, values)

    def get_seq_length(self) -> int:
        """Return the number of cached tokens of a sequence, in all processes."""
        return self._tokens

    def share_of(self, tokens: int) -> int:
        """Return how many of ``tokens`` cached tokens this process holds."""
        return len(range(self.ranks.rank, tokens, self.ranks.size))

    def most_rows(self) -> int:
        """Return the number of rows of the process that holds the most."""
        return -(-self._tokens // self.ranks.size)

    def columns(self, mask: Tensor) -> Tensor:
        """Return the columns of ``mask`` [B, 1, n, T] that belong to this process's rows."""
        return mask[..., self.ranks.rank :: self.ranks.size].contiguous()

    def whole(self, rows: Rows) -> Rows:
        """Collect the rows of all processes.

        Args:
            rows: this process's share [B, m, ·].

        Returns:
            The rows [B, T, ·] of all tokens in their order, without scales.
        """
        parts = rows.full()
        joined = torch.cat(parts, -1)
        even = pad(joined, (0, 0, 0, self.most_rows() - joined.shape[1])).contiguous()
        # As bytes: not every backend of torch.distributed sends every dtype.
        gathered = self.ranks.gather(even.view(torch.uint8)).view(even.dtype)
        whole = gathered.permute(1, 2, 0, 3).flatten(1, 2)[:, : self._tokens]
        return Rows(*whole.split([part.shape[-1] for part in parts], -1))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of each sequence."""
        # transformers 5.17 takes a positive number for the length to keep.
        kept = self._tokens + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, self._tokens)
        if not self.is_initialized or kept == self._tokens:
            return
        self._tokens = max(kept, 0)
        rows = self.share_of(self._tokens)
        self.keys, self.values = cast(Tensor, self.keys)[..., :rows, :], cast(Tensor, self.values)[..., :rows, :]

    def reset(self) -> None:
        """Remove all rows and release the buffer."""
        super().reset()
        self._tokens = 0

    def _buffer(self, cached: int, total: int, kv_c: Tensor, k_pe: Tensor) -> Tensor:
        # All processes grow their buffers at the same step.
        return super()._buffer(cached, self.most_rows(), kv_c, k_pe)


def grow_cache(
    cache: Cache | None, layer: int, ranks: Ranks, *, packed: bool = False
) -> LatentLayer | PackedStaticLayer | None:
    """Replace one layer of a dynamic ``cache`` by one of ``runtime`` with the same rows.

    Layers with sliding windows are short and stay whole in every process.

    Args:
        cache: the cache of a model, or None.
        layer: index of the layer.
        ranks: the processes that share the rows; with one process, a ``LatentLayer`` holds them all.
        packed: whether the layer stores latents as float8.

    Returns:
        The layer, or None if it has another class or is yet to be made.

    Raises:
        TransmlaError: if several processes are to share a cache that is not dynamic.
        ValueError: see ``latent_cache.grow_in_place``.
    """
    if ranks.size == 1:
        return grow_in_place(cache, layer, packed=packed)
    layers: list[Any] = getattr(cache, "layers", [])
    if layer >= len(layers):
        return None
    current = layers[layer]
    if isinstance(current, SplitLayer):
        return current
    if type(current) is DynamicSlidingWindowLayer:
        return None
    if type(current) is not DynamicLayer:
        raise TransmlaError(
            f"{ranks.size} processes cannot share a {type(current).__name__}",
            limit="context_parallel divides dynamic caches, the default of generate()",
            remedy="leave out cache_implementation, or load the model without context_parallel",
        )
    layers[layer] = split = SplitLayer(ranks, packed=packed)
    if current.is_initialized:
        split.adopt(cast(Tensor, current.keys), cast(Tensor, current.values))
    return split


def merge_shares(output: Tensor, lse: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Merge the attention of all processes to their own rows. All processes get the same bits.

    Args:
        output: this process's outputs [B, n, H, d_v].
        lse: their log-sum-exps [B, n, H]; minus infinity where no row of this process may be attended to.
        ranks: the processes.

    Returns:
        Outputs [B, n, H, d_v] and log-sum-exps [B, n, H] of the attention to all rows.
    """
    exact = torch.promote_types(output.dtype, torch.float32)
    packed = torch.cat([output.to(exact), lse[..., None].to(exact)], -1)
    outputs, partial_lse = ranks.gather(packed.contiguous()).split([output.shape[-1], 1], -1)
    limits = torch.finfo(exact)
    # A padded token attends to no row of any process. Its output is zeros, not NaN.
    top = partial_lse.amax(0).clamp_min(limits.min)
    weights = (partial_lse - top).exp()
    total = weights.sum(0)
    merged = (outputs * weights).sum(0) / total.clamp_min(limits.tiny)
    return merged.to(output.dtype), (top + total.log())[..., 0].to(lse.dtype)
