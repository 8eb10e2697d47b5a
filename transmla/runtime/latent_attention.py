"""MLA as transformers runs it, with decoding over the latent itself.

transformers' MLA layers cache the latent but rebuild every head's keys and values from it at every step
(``expand_kv``). Here the step is left out: the attention gets the latent, and either expands it (prefill, training)
or folds W_UK into the queries and W_UV into the output (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). Projections,
norms and rotary embedding stay the family's own, so every family that has ``expand_kv`` is served.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transmla.kernels.rows import Decode, Rows, Scores
from transmla.modeling.modeling_transmla import TransmlaAttention, attention_class
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.latent_cache import grow_in_place
from transmla.runtime.packed_rows import unpack
from transmla.runtime.prefix_cache import PrefixLayer, attend, expanding_is_cheaper, merge, one_width, prefix_layer

# The name that transformers knows this attention by.
LATENT_ATTENTION = "latent_attention"
# More new tokens than this are expanded, whatever they cost: decode kernels are made for few.
MAX_NEW_TOKENS = 128
# Kernels are compiled for each number of new tokens: more are given in pieces.
PIECE = 32


class LatentAttention(nn.Module):
    """What an MLA attention of transformers becomes; mixed in before its own class."""

    decode: Decode
    # Sets ``decode`` for where the layer is, and remembers in ``place`` where that was.
    choose: Callable[[LatentAttention], None]
    place: tuple[torch.dtype, torch.device]
    layer_idx: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    # Whether rows are cached in 8 bits.
    packed: bool = False
    prefix: PrefixLayer | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own forward, over a cache that has room to grow."""
        weight: Tensor = self.kv_b_proj.weight  # type: ignore[assignment, union-attr]
        if (weight.dtype, weight.device) != self.place:
            self.choose(self)
        cache = kwargs.get(CACHE_ARGUMENT)
        grow_in_place(cache, self.layer_idx, packed=self.packed)
        self.prefix = prefix_layer(cache, self.layer_idx)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.prefix = None

    def __reduce__(self) -> Any:
        """Pickled by the family's class: this one is made when it is needed."""
        plain = type(self).__mro__[2]
        own = issubclass(plain, TransmlaAttention)
        return _bare, (plain.__mro__[2] if own else plain, own), self.__dict__

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """The latent and the rotary key as they are, for ``latent_attention`` to decide."""
        return kv_nope, k_rot

    def expanded(self, kv_c: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, H, T, d_n + d_r] and values [B, H, T, d_v] of all heads."""
        return super().expand_kv(kv_c, k_pe)  # type: ignore[misc,no-any-return]


@cache
def latent_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The latent twin of an attention class."""
    return type(f"Latent{plain.__name__}", (LatentAttention, plain), {})


def _bare(plain: Any, own: bool) -> Any:
    """An instance of the latent twin of ``plain``, or of its class in the ``own`` format, without its state."""
    made: Any = attention_class(plain) if own else plain
    latent: Any = latent_class(made)
    return latent.__new__(latent)


def crossover(module: Any) -> float:
    """Number of new tokens from which rebuilding keys and values costs less than attending to the latent.

    On a long cache, per cached token and head: r(d_n + d_v) to rebuild, n(d_n + d_r + d_v) to attend to what was
    rebuilt, n(2r + d_r) to attend to the latent.
    """
    heads = module.qk_nope_head_dim + module.v_head_dim
    saved = 2 * module.kv_lora_rank - heads
    return module.kv_lora_rank * heads / saved if saved > 0 else float("inf")


def latent_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``query`` [B, H, n, d_n + d_r] to a latent ``key`` [B, 1, T, r] and rotary ``value`` [B, 1, T, d_r].

    ``attention_mask`` is boolean [B, 1, n, T] or None, as for SDPA. Returns [B, n, H, d_v]. Layers of a model that
    are not MLA come here too, and get SDPA; or their family's own attention, if it adds to the scores.
    """
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    plain = all(kwargs.get(name) is None for name in _CHANGES_SCORES)
    if not isinstance(module, LatentAttention):
        if not plain:
            return _by_family(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    rows = _rows(module, key, value, query.dtype)
    absorbable = _can_absorb(module, query, key, attention_mask, kwargs)
    if module.prefix is not None:
        _see_all_of(module.prefix, query, attention_mask)
        if absorbable:
            found = _behind_prefix(module, module.prefix, query, rows, attention_mask, scaling, kwargs)
            return _with_sinks(*found, kwargs), None
        rows = module.prefix.whole(rows)
    elif absorbable and _absorbing_is_cheaper(module, query, key, attention_mask):
        return _with_sinks(*_decoded(module, query, rows, attention_mask, scaling, kwargs), kwargs), None
    keys, values = module.expanded(*(part[:, None] for part in rows.full()))
    if not plain:
        return _by_family(module, query, keys, values, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    # Fused kernels want one width.
    query, keys, wide = one_width(query, keys, values)
    output, weights = sdpa(module, query, keys, wide, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    return output[..., : values.shape[-1]], weights


def _rows(module: Any, key: Tensor, value: Tensor, dtype: torch.dtype) -> Rows:
    """What a cache layer returned: latents [B, 1, T, r] and rotary keys [B, 1, T, d_r], or packed rows."""
    if key.dtype == torch.uint8:
        return unpack(key[:, 0], module.kv_lora_rank, module.qk_rope_head_dim, dtype)
    return Rows(key[:, 0], value[:, 0])


def _absorbing_is_cheaper(module: Any, query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether attending to the latent costs less than expanding it."""
    new, total = query.shape[2], key.shape[2]
    return new == 1 or (new < total and mask is not None and new <= min(crossover(module), MAX_NEW_TOKENS))


def _can_absorb(module: Any, query: Tensor, key: Tensor, mask: Tensor | None, extras: dict[str, Any]) -> bool:
    """Whether attending to the latent gives what expanding it does."""
    if extras.get("position_bias") is not None:
        return False
    if mask is not None and mask.dtype != torch.bool:
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return False
    # Adapters, quantised and offloaded weights are read by their own forward only.
    reader = module.kv_b_proj
    return type(reader) is nn.Linear and reader.bias is None and reader.weight.device == query.device


# What some families add to the scores: biases, a cap, and the scores [H] of a key that has no value (sinks).
_CHANGES_SCORES = ("position_bias", "softcap", "s_aux")


def _with_sinks(output: Tensor, lse: Tensor, extras: dict[str, Any]) -> Tensor:
    """Attention [B, n, H, d_v] whose scores sum to exp(``lse``) [B, n, H], once the sinks have had their share."""
    sinks = extras.get("s_aux")
    return output if sinks is None else output * torch.sigmoid(lse - sinks.to(lse))[..., None].to(output.dtype)


def _by_family(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention as a family computes it itself: SDPA knows nothing of what it adds to its scores."""
    family = next(c for c in type(module).__mro__ if c.__module__.startswith("transformers.models."))
    new, total = query.shape[2], key.shape[2]
    if mask is None and new > 1:
        # None is SDPA's word for causal.
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return sys.modules[family.__module__].eager_attention_forward(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]


def _decoded(
    module: Any, query: Tensor, rows: Rows, mask: Tensor | None, scaling: float | None, extras: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Outputs [B, n, H, d_v] and log-sum-exps [B, n, H] over the latent."""
    d_n, d_v, rank = module.qk_nope_head_dim, module.v_head_dim, module.kv_lora_rank
    w_uk, w_uv = module.kv_b_proj.weight.view(-1, d_n + d_v, rank).split([d_n, d_v], 1)
    q_nope, q_pe = query.split([d_n, query.shape[-1] - d_n], -1)
    q_latent, q_pe = torch.einsum("bhnd,hdr->bnhr", q_nope, w_uk), q_pe.transpose(1, 2)
    found, scale = [], scaling or module.scaling
    for start in range(0, q_latent.shape[1], PIECE):
        part = slice(start, start + PIECE)
        own = mask if mask is None or mask.shape[2] == 1 else mask[:, :, part]
        tokens = q_latent[:, part], q_pe[:, part]
        found.append(module.decode(*tokens, rows, Scores(scale, own, extras.get("softcap"))))
    mixed, lse = found[0] if len(found) == 1 else (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return torch.einsum("bnhr,hvr->bnhv", mixed, w_uv), lse


def _see_all_of(layer: PrefixLayer, query: Tensor, mask: Tensor | None) -> None:
    """Refuse a mask that hides some of the prefix, when the first tokens behind it come."""
    first = layer.own_length() == query.shape[2]
    if first and mask is not None and not (mask if mask.dtype == torch.bool else mask == 0)[..., : layer.shared].all():
        raise ValueError(
            "the attention mask hides a part of the shared prefix, which all sequences see whole; pad between the "
            "prefix and what follows it"
        )


def _behind_prefix(
    module: Any,
    layer: PrefixLayer,
    query: Tensor,
    rows: Rows,
    mask: Tensor | None,
    scaling: float | None,
    extras: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Attention to a prefix that all sequences share and to each one's own rows, and its log-sum-exp."""
    batch, heads, new, width = query.shape
    own = None if mask is None else mask[..., layer.shared :]
    right, right_lse = _decoded(module, query, rows, own, scaling, extras)
    # To the prefix, the queries of all sequences are those of one.
    together = query.transpose(0, 1).reshape(1, heads, batch * new, width)
    if extras.get("softcap") is None and expanding_is_cheaper(module, batch * new):
        if layer.expanded is None:
            # Made one width now, lest every step do it again.
            keys, values = one_width(*module.expanded(*layer.prefix))
            layer.expanded = keys, values
        output, lse = attend(together, *layer.expanded, scaling=scaling or module.scaling)
        left, left_lse = output[..., : module.v_head_dim].transpose(1, 2), lse.transpose(1, 2)
    else:
        shared = Rows(*(part[:, 0] for part in layer.prefix))
        left, left_lse = _decoded(module, together, shared, None, scaling, extras)
    left, left_lse = left.view(batch, new, heads, -1), left_lse.reshape(batch, new, heads)
    return merge(left, left_lse, right, right_lse), torch.logaddexp(left_lse, right_lse)


AttentionInterface.register(LATENT_ATTENTION, latent_attention)
AttentionMaskInterface.register(LATENT_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
