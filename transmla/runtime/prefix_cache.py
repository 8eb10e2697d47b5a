"""One prompt, many continuations: a prefix that is held once and attended to by the whole batch.

TyphoonMLA (arXiv 2509.21081): the shared prefix is attended to in expanded form, whose work per query is the
smallest and whose keys and values are read once for all sequences; every sequence's own suffix in absorbed form;
the two merge by log-sum-exp. For few queries the prefix too is attended to as a latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from transmla.kernels.rows import Rows
from transmla.runtime.latent_cache import LatentLayer

# Products that a GPU does in the time it reads one value. Expanding pays where the products it saves take longer than
# the wider rows that it reads: on an H200, rows of 512 + 64, 32 heads of 128, from about 42 queries on, as this number
# has it (scripts/results/prefix.json).
PRODUCTS_PER_VALUE = 100


class PrefixLayer(LatentLayer):
    """A shared prefix [1, 1, P, r], [1, 1, P, d_r], and behind it the rows of each sequence.

    ``update`` returns the sequences' own rows only; the attention finds the prefix in ``prefix``.
    """

    def __init__(self, kv_c: Tensor, k_pe: Tensor, *, packed: bool = False) -> None:
        super().__init__(packed=packed)
        self.prefix = kv_c, k_pe
        self.expanded: tuple[Tensor, Tensor] | None = None

    @property
    def shared(self) -> int:
        """P."""
        return self.prefix[0].shape[2]

    def whole(self, rows: Rows) -> Rows:
        """The prefix and behind it each sequence's own ``rows``."""
        parts = zip(self.prefix, rows.full(), strict=True)
        return Rows(*(torch.cat([shared[:, 0].expand(len(own), -1, -1), own], 1) for shared, own in parts))

    def get_seq_length(self) -> int:
        """Tokens seen by every sequence."""
        return self.shared + self.own_length()


def share(cache: Cache, *, packed: bool = False) -> Cache:
    """Make all that ``cache`` holds, of one sequence, the prefix of any number of them; returns the cache.

    Rows behind it may be ``packed``; its own are not.

    Raises:
        ValueError: if it holds several sequences, or none.
    """
    for i, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.shape[0] != 1:
            raise ValueError("a shared prefix is made from the cache of one sequence")
        cache.layers[i] = PrefixLayer(keys, values, packed=packed)
    return cache


def prefix_layer(cache: Any, layer: int) -> PrefixLayer | None:
    """The layer of ``cache`` if it has a shared prefix."""
    layers = getattr(cache, "layers", [])
    found = layers[layer] if layer < len(layers) else None
    return found if isinstance(found, PrefixLayer) else None


def expanding_is_cheaper(module: Any, queries: int) -> bool:
    """Whether ``queries`` tokens, over all sequences, read a shared prefix faster when it is expanded."""
    expanded = module.qk_nope_head_dim + module.qk_rope_head_dim + module.v_head_dim
    absorbed = 2 * module.kv_lora_rank + module.qk_rope_head_dim
    return queries * (absorbed - expanded) > PRODUCTS_PER_VALUE * expanded


def one_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose last dimension zeros make as wide as the widest, which is what flash attention takes."""
    width = max(t.shape[-1] for t in tensors)
    return tuple(t if t.shape[-1] == width else pad(t, (0, width - t.shape[-1])) for t in tensors)


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of ``q`` [1, H, M, d] to all of ``k`` [1, H, P, d] and ``v`` [1, H, P, d_v].

    Returns [1, H, M, d_v] and the log-sum-exp of the scores [1, H, M]. On a GPU in half precision by flash attention.
    """
    width = max(t.shape[-1] for t in (q, k, v))
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and width <= 256:
        wide = one_width(q, k, v)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(*wide, scale=scaling)[:2]
        return output[..., : v.shape[-1]], lse
    scores = (q @ k[..., : q.shape[-1]].mT).to(torch.promote_types(q.dtype, torch.float32)) * scaling
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def merge(left: Tensor, left_lse: Tensor, right: Tensor, right_lse: Tensor) -> Tensor:
    """Attention to two sets of keys from attention to each: means [..., d] and log-sum-exps [...]."""
    weight = torch.sigmoid(left_lse - right_lse)[..., None].to(left.dtype)
    return left * weight + right * (1 - weight)
