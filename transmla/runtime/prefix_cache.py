"""Cache of one prompt for many continuations: the whole batch attends to a prefix that is cached once.

The method is TyphoonMLA (arXiv 2509.21081). Queries attend to the shared prefix in expanded form, which has the fewest
products per query; its keys and values are read once for all sequences. Queries attend to the suffix of their own
sequence in absorbed form. The two results are merged by log-sum-exp. With few queries, the prefix too is read in
absorbed form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from transmla.kernels.rows import Rows
from transmla.runtime.head_widths import one_width
from transmla.runtime.latent_cache import LatentLayer


class PrefixLayer(LatentLayer):
    """Shared prefix of one layer, and the rows that each sequence has behind the prefix.

    ``update`` returns only the rows behind the prefix. The attention reads the prefix from the attribute ``prefix``.

    Attributes:
        prefix: latents [1, 1, P, r] and rotary keys [1, 1, P, d_r], never packed.
        expanded: keys and values [1, H, P, width] of the prefix, padded to one width; None until they are first used.
    """

    def __init__(self, kv_c: Tensor, k_pe: Tensor, *, packed: bool = False) -> None:
        super().__init__(packed=packed)
        self.prefix = kv_c, k_pe
        self.expanded: tuple[Tensor, Tensor] | None = None

    @property
    def shared(self) -> int:
        """Number of tokens P in the prefix."""
        return self.prefix[0].shape[2]

    @property
    def shared_rows(self) -> Rows:
        """The prefix as rows [1, P, ·]."""
        return Rows(*(part[:, 0] for part in self.prefix))

    def whole(self, rows: Rows) -> Rows:
        """Return the prefix followed by the ``rows`` [B, T, ·] of each sequence: rows [B, P + T, ·]."""
        parts = zip(self.prefix, rows.full(), strict=True)
        return Rows(*(torch.cat([shared[:, 0].expand(len(suffix), -1, -1), suffix], 1) for shared, suffix in parts))

    def get_seq_length(self) -> int:
        """Return the number of cached tokens of a sequence, prefix included."""
        return self.shared + self.own_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` rows of each sequence.

        Raises:
            ValueError: if this would remove a part of the prefix.
        """
        # transformers 5.17 takes a positive number for the length to keep.
        removed = -tokens_to_remove if tokens_to_remove <= 0 else self.get_seq_length() - tokens_to_remove
        if removed > self.own_length():
            raise ValueError(
                f"cannot remove {removed} tokens: {self.own_length()} lie behind the shared prefix, which stays whole"
            )
        if removed > 0:
            super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the sequences for beam search. The prefix is the same for all."""
        if self.own_length():
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence. The prefix is the same for all."""
        if self.own_length():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences with these ``indices``. The prefix is the same for all."""
        if self.own_length():
            super().batch_select_indices(indices)


class PrefixCache(DynamicCache):
    """Cache of one prompt for any number of sequences.

    Attributes:
        prompt: tokens [1, P] of the prefix; None if they are unknown.
        signature: logits [1, vocabulary] of one token behind the prefix, by which a change of the weights is noticed.
        placed: dtype and device of the model that made the prefix.
    """

    def __init__(self, layers: list[PrefixLayer]) -> None:
        super().__init__()
        self.layers: list[Any] = [*layers]
        self.layer_class_to_replicate = None
        self.prompt: Tensor | None = None
        self.signature: Tensor | None = None
        self.placed: tuple[torch.dtype, torch.device] | None = None

    def reset(self) -> None:
        """Remove all rows behind the prefix."""
        for layer in self.layers:
            layer.reset()


def share(cache: Cache, *, packed: bool = False) -> PrefixCache:
    """Return a cache whose prefix are the rows of one cached sequence.

    Args:
        cache: the cache of one sequence.
        packed: whether rows behind the prefix store latents as float8. The prefix itself is not packed.

    Raises:
        ValueError: if the cache holds several sequences or none.
    """
    parts: list[tuple[Any, Any]] = [
        (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers
    ]
    if any(keys is None or values is None or keys.shape[0] != 1 for keys, values in parts):
        raise ValueError("a shared prefix is made from the cache of one sequence")
    return PrefixCache([PrefixLayer(keys, values, packed=packed) for keys, values in parts])


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attend to all keys, without a mask. A GPU in half precision uses flash attention.

    Args:
        q: queries [1, H, M, d].
        k: keys [1, H, P, d]; columns in front of the last d are ignored.
        v: values [1, H, P, d_v].
        scaling: factor on the scores.

    Returns:
        Outputs [1, H, M, d_v], and the log-sum-exp of the scores [1, H, M].
    """
    width = max(t.shape[-1] for t in (q, k, v))
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and width <= 256:
        wide = one_width(q, k, v)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(*wide, scale=scaling)[:2]
        return output[..., -v.shape[-1] :], lse
    scores = (q @ k[..., -q.shape[-1] :].mT).to(torch.promote_types(q.dtype, torch.float32)) * scaling
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def merge(left: Tensor, left_lse: Tensor, right: Tensor, right_lse: Tensor) -> Tensor:
    """Merge the attention to two sets of keys, with outputs [..., d] and log-sum-exps [...], to outputs [..., d]."""
    weight = torch.sigmoid(left_lse - right_lse)[..., None].to(left.dtype)
    return left * weight + right * (1 - weight)
