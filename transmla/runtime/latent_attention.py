"""Attention function for transformers' MLA layers that decodes over the cached latent.

transformers' MLA layers cache the latent, but rebuild the keys and values of all heads from it at every step
(``expand_kv``). Here ``expand_kv`` passes the latent on, and the attention function chooses between two forms. The
expanded form rebuilds keys and values (prefill, training). The absorbed form folds W_UK into the queries and W_UV into
the output (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

Projections, norms and rotary embedding are still computed by the family's code. Every family whose attention has
``expand_kv`` is therefore supported.
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
from transmla.runtime.float16 import refuse_float16_autocast
from transmla.runtime.latent_cache import grow_in_place
from transmla.runtime.packed_rows import unpack
from transmla.runtime.prefix_cache import PrefixLayer, attend, expanding_is_cheaper, merge, one_width, prefix_layer

# Name under which this attention is registered with transformers.
LATENT_ATTENTION = "latent_attention"
# Largest number of new tokens per sequence for the absorbed form. Decode kernels are built for few new tokens.
MAX_NEW_TOKENS = 128
# Largest number of new tokens in one kernel call. A kernel is compiled for each number of new tokens.
PIECE = 32


class LatentAttention(nn.Module):
    """Mixin that turns an MLA attention class of transformers into one that decodes over its latent.

    ``latent_class`` places the mixin before the family's class.

    Attributes:
        decode: decode function of the chosen backend.
        choose: sets ``decode`` and ``placed_for`` from the dtype and device of the weights.
        placed_for: dtype and device for which ``decode`` was chosen.
        layer_idx: index of the layer.
        kv_lora_rank: width r of a latent.
        qk_rope_head_dim: width d_r of a rotary key.
        packed: whether latents are cached as float8.
        prefix: the cache layer of the running ``forward``, if it has a shared prefix.
    """

    decode: Decode
    choose: Callable[[LatentAttention], None]
    placed_for: tuple[torch.dtype, torch.device]
    layer_idx: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    packed: bool = False
    prefix: PrefixLayer | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the family's ``forward`` with a cache layer that grows without copying.

        Raises:
            TransmlaError: under an autocast to float16, if a latent norm is an identity.
        """
        weight: Tensor = self.kv_b_proj.weight  # type: ignore[assignment, union-attr]
        if (weight.dtype, weight.device) != self.placed_for:
            self.choose(self)
        refuse_float16_autocast(self, weight.device)
        cache = kwargs.get(CACHE_ARGUMENT)
        grow_in_place(cache, self.layer_idx, packed=self.packed)
        self.prefix = prefix_layer(cache, self.layer_idx)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.prefix = None

    def __reduce__(self) -> Any:
        """Pickle the family's class instead of this one, which ``latent_class`` creates at run time."""
        plain = type(self).__mro__[2]
        transmla_format = issubclass(plain, TransmlaAttention)
        return _bare, (plain.__mro__[2] if transmla_format else plain, transmla_format), self.__dict__

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents [B, 1, T, r] and rotary keys [B, 1, T, d_r] unchanged: ``latent_attention`` expands them."""
        return kv_nope, k_rot

    def expanded(self, kv_c: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Expand ``kv_c`` [B, 1, T, r] and ``k_pe`` [B, 1, T, d_r] for all heads with the family's ``expand_kv``.

        Returns:
            Keys [B, H, T, d_n + d_r] and values [B, H, T, d_v].
        """
        return super().expand_kv(kv_c, k_pe)  # type: ignore[misc,no-any-return]


@cache
def latent_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of an MLA attention class ``plain`` that decodes over its latent."""
    return type(f"Latent{plain.__name__}", (LatentAttention, plain), {})


def _bare(plain: Any, transmla_format: bool) -> Any:
    """An instance without state, for unpickling: of the latent class of ``plain`` or of its transmla-format class."""
    base: Any = attention_class(plain) if transmla_format else plain
    latent: Any = latent_class(base)
    return latent.__new__(latent)


def crossover(module: Any) -> float:
    """Return the number n of new tokens above which the expanded form costs less than the absorbed form.

    Multiplications on a long cache, per cached token and head: r(d_n + d_v) to rebuild keys and values, then
    n(d_n + d_r + d_v) to attend to them; n(2r + d_r) to attend to the latent.
    """
    rebuilt = module.qk_nope_head_dim + module.v_head_dim
    saved = 2 * module.kv_lora_rank - rebuilt
    return module.kv_lora_rank * rebuilt / saved if saved > 0 else float("inf")


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
    """Attend to a latent cache; an attention function as transformers calls them.

    transformers also calls this function for layers that are not MLA. These layers get SDPA, or the family's eager
    attention if the family changes the scores.

    Args:
        module: the attention layer.
        query: [B, H, n, d_n + d_r].
        key: latents [B, 1, T, r], or packed rows [B, 1, T, row_bytes].
        value: rotary keys [B, 1, T, d_r].
        attention_mask: boolean [B, 1, n, T], additive with the same shape, or None (causal), as for SDPA.
        scaling: factor on the scores.
        dropout: probability that an attention weight is dropped.
        kwargs: extras of the family: ``position_bias``, ``softcap``, ``s_aux`` (sinks).

    Returns:
        Outputs [B, n, H, d_v], and attention weights if the family's eager attention computed them.

    Raises:
        ValueError: if the mask hides a part of a shared prefix.
    """
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    plain = all(kwargs.get(name) is None for name in _CHANGES_SCORES)
    if not isinstance(module, LatentAttention):
        if not plain:
            return _by_eager(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    rows = _cached_rows(module, key, value, query.dtype)
    absorbable = _can_absorb(module, query, key, attention_mask, kwargs)
    if module.prefix is not None:
        _refuse_hidden_prefix(module.prefix, query, attention_mask)
        if absorbable:
            result = _attend_with_prefix(module, module.prefix, query, rows, attention_mask, scaling, kwargs)
            return _with_sinks(*result, kwargs), None
        rows = module.prefix.whole(rows)
    elif absorbable and _absorbing_is_cheaper(module, query, key, attention_mask):
        return _with_sinks(*_attend_to_latent(module, query, rows, attention_mask, scaling, kwargs), kwargs), None
    keys, values = module.expanded(*(part[:, None] for part in rows.full()))
    if not plain:
        return _by_eager(module, query, keys, values, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    # Fused kernels need queries, keys and values of one width.
    query, keys, wide = one_width(query, keys, values)
    output, weights = sdpa(module, query, keys, wide, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    return output[..., : values.shape[-1]], weights


def _cached_rows(module: Any, key: Tensor, value: Tensor, dtype: torch.dtype) -> Rows:
    """Rows of latents [B, 1, T, r] and rotary keys [B, 1, T, d_r], or of packed rows, as a cache layer returns them."""
    if key.dtype == torch.uint8:
        return unpack(key[:, 0], module.kv_lora_rank, module.qk_rope_head_dim, dtype)
    return Rows(key[:, 0], value[:, 0])


def _absorbing_is_cheaper(module: Any, query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether the absorbed form costs less than the expanded form."""
    new, total = query.shape[2], key.shape[2]
    return new == 1 or (new < total and mask is not None and new <= min(crossover(module), MAX_NEW_TOKENS))


def _can_absorb(module: Any, query: Tensor, key: Tensor, mask: Tensor | None, extras: dict[str, Any]) -> bool:
    """Whether the absorbed form gives the same result as the expanded form."""
    if extras.get("position_bias") is not None:
        return False
    if mask is not None and mask.dtype != torch.bool:
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return False
    # The absorbed form reads the weight directly. Adapters, quantised and offloaded weights need their ``forward``.
    projection = module.kv_b_proj
    return type(projection) is nn.Linear and projection.bias is None and projection.weight.device == query.device


# Arguments by which a family changes the scores: a bias, a soft-cap, and sinks (scores [H] of a key without a value).
_CHANGES_SCORES = ("position_bias", "softcap", "s_aux")


def _with_sinks(output: Tensor, lse: Tensor, extras: dict[str, Any]) -> Tensor:
    """Scale ``output`` [B, n, H, d_v] by the softmax share that sinks leave it; ``lse`` [B, n, H] is without sinks."""
    sinks = extras.get("s_aux")
    return output if sinks is None else output * torch.sigmoid(lse - sinks.to(lse))[..., None].to(output.dtype)


def _by_eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Run the family's eager attention, because SDPA does not support the family's changes to the scores."""
    family = next(c for c in type(module).__mro__ if c.__module__.startswith("transformers.models."))
    new, total = query.shape[2], key.shape[2]
    if mask is None and new > 1:
        # For SDPA, no mask means causal.
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return sys.modules[family.__module__].eager_attention_forward(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]


def _attend_to_latent(
    module: Any, query: Tensor, rows: Rows, mask: Tensor | None, scaling: float | None, extras: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Attend to ``rows`` in absorbed form: outputs [B, n, H, d_v] and log-sum-exps [B, n, H]."""
    d_n, d_v, rank = module.qk_nope_head_dim, module.v_head_dim, module.kv_lora_rank
    w_uk, w_uv = module.kv_b_proj.weight.view(-1, d_n + d_v, rank).split([d_n, d_v], 1)
    q_nope, q_pe = query.split([d_n, query.shape[-1] - d_n], -1)
    q_latent, q_pe = torch.einsum("bhnd,hdr->bnhr", q_nope, w_uk), q_pe.transpose(1, 2)
    pieces, scale = [], scaling or module.scaling
    for start in range(0, q_latent.shape[1], PIECE):
        part = slice(start, start + PIECE)
        part_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, part]
        tokens = q_latent[:, part], q_pe[:, part]
        pieces.append(module.decode(*tokens, rows, Scores(scale, part_mask, extras.get("softcap"))))
    mixed, lse = pieces[0] if len(pieces) == 1 else (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
    return torch.einsum("bnhr,hvr->bnhv", mixed, w_uv), lse


def _refuse_hidden_prefix(layer: PrefixLayer, query: Tensor, mask: Tensor | None) -> None:
    """Raise a ValueError if ``mask`` hides a part of the prefix; checked once, with the first tokens behind it."""
    first = layer.own_length() == query.shape[2]
    if first and mask is not None and not (mask if mask.dtype == torch.bool else mask == 0)[..., : layer.shared].all():
        raise ValueError(
            "the attention mask hides a part of the shared prefix, but every sequence attends to the whole prefix; put "
            "the padding between the prefix and its continuation"
        )


def _attend_with_prefix(
    module: Any,
    layer: PrefixLayer,
    query: Tensor,
    rows: Rows,
    mask: Tensor | None,
    scaling: float | None,
    extras: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Attend to the shared prefix and to each sequence's ``rows``: outputs [B, n, H, d_v], log-sum-exps [B, n, H]."""
    batch, heads, new, width = query.shape
    suffix_mask = None if mask is None else mask[..., layer.shared :]
    right, right_lse = _attend_to_latent(module, query, rows, suffix_mask, scaling, extras)
    # All sequences share the prefix, so their queries form one batch entry with B n tokens.
    together = query.transpose(0, 1).reshape(1, heads, batch * new, width)
    if extras.get("softcap") is None and expanding_is_cheaper(module, batch * new):
        if layer.expanded is None:
            # Padded to one width here, once, instead of at every step.
            keys, values = one_width(*module.expanded(*layer.prefix))
            layer.expanded = keys, values
        output, lse = attend(together, *layer.expanded, scaling=scaling or module.scaling)
        left, left_lse = output[..., : module.v_head_dim].transpose(1, 2), lse.transpose(1, 2)
    else:
        shared = Rows(*(part[:, 0] for part in layer.prefix))
        left, left_lse = _attend_to_latent(module, together, shared, None, scaling, extras)
    left, left_lse = left.view(batch, new, heads, -1), left_lse.reshape(batch, new, heads)
    return merge(left, left_lse, right, right_lse), torch.logaddexp(left_lse, right_lse)


AttentionInterface.register(LATENT_ATTENTION, latent_attention)
AttentionMaskInterface.register(LATENT_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
