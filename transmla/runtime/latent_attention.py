"""Attention function for transformers' MLA layers that decodes over the cached latent.

transformers' MLA layers cache the latent, but rebuild the keys and values of all heads from it at every step
(``expand_kv``). Here ``expand_kv`` passes the latent on, and the attention function chooses between two forms. The
expanded form rebuilds keys and values (prefill, training). The absorbed form folds W_UK into the queries and W_UV into
the output (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

Projections, norms and rotary embedding are still those of the family, some of them in fewer kernels (``fused_norms``,
``expansion``). Every family whose attention has ``expand_kv`` is therefore supported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from transmla.kernels.rows import Decode, Rows
from transmla.modeling.modeling_transmla import TransmlaAttention, attention_class
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.ranks import Ranks
from transmla.runtime.absorbed import (
    attend_to_latent,
    attend_with_others,
    attend_with_prefix,
    can_absorb,
    with_sinks,
)
from transmla.runtime.class_swap import class_below
from transmla.runtime.expansion import can_expand, expand, may_overwrite, may_write, rotate
from transmla.runtime.family_attention import attend_expanded
from transmla.runtime.forms import ABSORBED, EXPANDED, absorbing_is_cheaper
from transmla.runtime.latent_cache import LatentLayer
from transmla.runtime.packed_rows import unpack
from transmla.runtime.packed_static import PackedStaticLayer
from transmla.runtime.prefix_cache import PrefixLayer
from transmla.runtime.split_cache import SplitLayer, grow_cache, merge_shares
from transmla.runtime.step_cache import StepCache, StepLayer
from transmla.runtime.underflow import precision, refuse_underflow

# Name under which this attention is registered with transformers.
LATENT_ATTENTION = "latent_attention"
# Warning for a request that this attention cannot fulfil.
WEIGHTS_REMEDY = (
    "latent_attention computes no attention weights, so output_attentions returns none; call "
    "model.set_attn_implementation('eager') to get them"
)


class LatentAttention(nn.Module):
    """Mixin that turns an MLA attention class of transformers into one that decodes over its latent.

    ``latent_class`` places the mixin before the family's class.

    Attributes:
        decode: decode function of the chosen backend.
        choose: sets ``decode`` and ``placed_for`` from the dtype and device of the weights.
        placed_for: dtype and device for which ``decode`` was chosen; None before the choice.
        config: the model's config.
        frequencies: returns cosines and sines of positions, in the transmla format.
        kv_b_proj: the projection from latents to keys and values.
        layer_idx: index of the layer.
        kv_lora_rank: width r of a latent.
        qk_rope_head_dim: width d_r of a rotary key.
        packed: whether latents are cached as float8.
        ranks: the processes that share the cached tokens.
        running: the cache layer of each thread that runs ``forward``; None for a layer that is not of ``runtime``.
        step: thread and ``StepLayer`` of the running ``forward``, if it is a step on fixed memory. One thread at a time
            runs such a step; others may run steps on caches meanwhile.
        warns: whether this layer is the one that is to warn of missing attention weights.
        form: the form in which the layer last attended to its latents, ``absorbed`` or ``expanded``; None before that.
        checked_for: precision in which the latents are known not to underflow; None before the first check.
    """

    decode: Decode
    choose: Callable[[LatentAttention], None]
    placed_for: tuple[torch.dtype, torch.device] | None
    config: Any
    frequencies: Any
    kv_b_proj: Any
    layer_idx: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    packed: bool = False
    ranks: Ranks = Ranks()
    running: dict[int, LatentLayer | PackedStaticLayer | None]
    step: tuple[int, Any] | None = None
    warns: bool = False
    form: str | None = None
    checked_for: torch.dtype | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the family's ``forward`` with a cache layer that grows without copying.

        Raises:
            TransmlaError: if the latents underflow, in float16 or under autocast to it; or if processes cannot share
                the cache.
        """
        dtype = precision(self)
        if dtype != self.checked_for:
            refuse_underflow(self, dtype)
            self.checked_for = dtype
        cache: Any = kwargs.get(CACHE_ARGUMENT)
        if isinstance(cache, StepCache):
            self.step = get_ident(), cache.layers[self.layer_idx]
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.step = None
        thread = _thread()
        # A hook may run the model again within this call.
        outer = self.running.get(thread)
        self.running[thread] = grow_cache(cache, self.layer_idx, self.ranks, packed=self.packed)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.running[thread] = outer
            if outer is None:
                self.running.pop(thread)

    @property
    def cached(self) -> LatentLayer | PackedStaticLayer | None:
        """The cache layer of this thread's running ``forward``, if it is one of ``runtime``."""
        return self.running.get(_thread())

    @property
    def prefix(self) -> PrefixLayer | None:
        """The cache layer of the running ``forward``, if it has a shared prefix."""
        return self.cached if isinstance(self.cached, PrefixLayer) else None

    @property
    def split(self) -> SplitLayer | None:
        """The cache layer of the running ``forward``, if it returned only this process's share of the rows."""
        return self.cached if isinstance(self.cached, SplitLayer) and self.cached.divided else None

    def __reduce__(self) -> Any:
        """Pickle the family's class instead of this one, which ``latent_class`` creates at run time."""
        transmla_format = isinstance(self, TransmlaAttention)
        family = class_below(self, TransmlaAttention if transmla_format else LatentAttention)
        # A thread that runs ``forward`` meanwhile does not run the copy's.
        return _bare, (family, transmla_format), self.__dict__ | {"running": {}, "step": None}

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the attention implementation attends to.

        ``latent_attention`` gets latents [B, 1, T, r] and rotary keys [B, 1, T, d_r], or packed rows, and expands them
        itself. Every other implementation gets keys [B, H, T, d_n + d_r] and values [B, H, T, d_v].
        """
        if self.config._attn_implementation == LATENT_ATTENTION:
            return kv_nope, k_rot
        rows, holder = cached_rows(self, kv_nope, k_rot, self.cached), self.prefix or self.split
        return self.expanded(rows if holder is None else holder.whole(rows))

    def expanded(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Expand the latents of ``rows`` for all heads, with the family's ``expand_kv`` where ``expand`` cannot.

        Returns:
            Keys [B, H, T, d_n + d_r] and values [B, H, T, d_v].
        """
        if self.config._attn_implementation == LATENT_ATTENTION and can_expand(self, rows):
            return expand(self, rows)
        return super().expand_kv(*(part[:, None] for part in rows.full()))  # type: ignore[misc,no-any-return]

    def _rotate(self, positions: Tensor, rows: Tensor) -> Tensor:
        """Do the same as ``TransmlaAttention._rotate``, with fewer kernels where no gradient is needed."""
        if not may_write():
            return super()._rotate(positions, rows)  # type: ignore[misc,no-any-return]
        return rotate(rows, *self.frequencies(positions))

    def with_rotated(self, query: Tensor, q_pe: Tensor) -> Tensor:
        """Do the same as ``TransmlaAttention.with_rotated``, in the memory of ``query`` where nothing else reads it.

        The attention's output then has the layout [B, T, H, d_v], so that ``o_proj`` reads it without a copy.
        """
        if not may_overwrite(self, query):
            return super().with_rotated(query, q_pe)  # type: ignore[misc,no-any-return]
        query = query.transpose(1, 2)
        query[..., self.qk_nope_head_dim :] = q_pe
        return query


def _thread() -> int:
    """Number of the running thread. Compiled code stores nothing for it, and gets one number for all threads."""
    return 0 if torch.compiler.is_compiling() else get_ident()


@cache
def latent_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of an MLA attention class ``plain`` that decodes over its latent."""
    return type(f"Latent{plain.__name__}", (LatentAttention, plain), {})


def _bare(plain: Any, transmla_format: bool) -> Any:
    """An instance without state, for unpickling: of the latent class of ``plain`` or of its transmla-format class."""
    base: Any = attention_class(plain) if transmla_format else plain
    latent: Any = latent_class(base)
    return latent.__new__(latent)


def latent_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend to a latent cache; an attention function as transformers calls them.

    transformers also calls this function for layers that are not MLA. These layers get SDPA, or the family's eager
    attention if the family changes the scores.

    Args:
        module: the attention layer.
        query: [B, H, n, d_n + d_r].
        key: latents [B, 1, T, r], or packed rows [B, 1, T, row_bytes].
        value: rotary keys [B, 1, T, d_r].
        attention_mask: boolean [B, 1, n, T], additive with the same shape, or None (causal), as for SDPA.
        kwargs: ``scaling`` of the scores, ``dropout`` of the attention weights, and extras of the family:
            ``position_bias``, ``softcap``, ``s_aux`` (sinks).

    Returns:
        Outputs [B, n, H, d_v], and None: the attention weights are never computed as a whole.

    Raises:
        ValueError: if the mask hides a part of a shared prefix.
    """
    extras = {"scaling": None, "dropout": 0.0} | kwargs
    wants_weights = extras.pop("output_attentions", False)
    if not isinstance(module, LatentAttention):
        return attend_expanded(module, query, key, value, attention_mask, **extras), None
    if wants_weights and module.warns:
        module.warns = False
        warnings.warn(WEIGHTS_REMEDY, stacklevel=2)
    if module.step is not None and module.step[0] == get_ident():
        layer = module.step[1]
        return _attend_in_step(module, layer, query, cached_rows(module, key, value, layer), extras), None
    rows, prefix, split = cached_rows(module, key, value, module.cached), module.prefix, module.split
    total = key.shape[2] if split is None else split.get_seq_length()
    wanted = prefix is not None or absorbing_is_cheaper(module, query, total, attention_mask)
    absorbable = wanted and can_absorb(module, query, rows, attention_mask, extras)
    if prefix is not None:
        _refuse_hidden_prefix(prefix, query, attention_mask)
        if absorbable and prefix.prefix[0].dtype == query.dtype:
            module.form = ABSORBED
            return with_sinks(*attend_with_prefix(module, prefix, query, rows, attention_mask, extras), extras), None
        rows = prefix.whole(rows)
    elif absorbable:
        module.form = ABSORBED
        if split is not None:
            return with_sinks(*attend_with_others(module, split, query, rows, attention_mask, extras), extras), None
        return with_sinks(*attend_to_latent(module, query, rows, attention_mask, extras), extras), None
    elif split is not None:
        rows = split.whole(rows)
    elif attention_mask is None and query.shape[2] > 1:
        # Without a mask, tokens read the rows up to their own. Those behind are unwritten rows of a static cache.
        rows = rows.first(query.shape[2])
    module.form = EXPANDED
    return attend_expanded(module, query, *module.expanded(rows), attention_mask, **extras), None


def _attend_in_step(module: Any, layer: StepLayer, query: Tensor, rows: Rows, extras: dict[str, Any]) -> Tensor:
    """Attend to the ``rows`` [B, capacity, ·] of a step whose number of valid rows is on the device."""
    rows = replace(rows, lengths=layer.lengths)
    if not can_absorb(module, query, rows, layer.mask, extras):
        raise RuntimeError("a layer needs expanded keys")
    module.form = ABSORBED
    output, lse = attend_to_latent(module, query, rows, layer.mask, extras)
    if layer.ranks.size > 1:
        output, lse = merge_shares(output, lse, layer.ranks)
    return with_sinks(output, lse, extras)


def cached_rows(module: Any, key: Tensor, value: Tensor, layer: Any) -> Rows:
    """Return the rows that the cache ``layer`` returned as ``key`` and ``value``.

    Args:
        module: the attention layer.
        key: latents [B, 1, T, r], or packed rows [B, 1, T, row_bytes].
        value: rotary keys [B, 1, T, d_r], or [B, 1, T, 0].
        layer: the layer; read for packed rows only.
    """
    if key.dtype == torch.uint8:
        return unpack(key[:, 0], module.kv_lora_rank, module.qk_rope_head_dim, layer.pe_dtype)
    return Rows(key[:, 0], value[:, 0])


def _refuse_hidden_prefix(layer: PrefixLayer, query: Tensor, mask: Tensor | None) -> None:
    """Raise a ValueError if ``mask`` hides a part of the prefix; checked once, with the first tokens behind it."""
    first = layer.own_length() == query.shape[2]
    if first and mask is not None and not (mask if mask.dtype == torch.bool else mask == 0)[..., : layer.shared].all():
        raise ValueError(
            "the attention mask hides a part of the shared prefix, but every sequence attends to the whole prefix; put "
            "the padding between the prefix and its continuation"
        )


AttentionInterface.register(LATENT_ATTENTION, latent_attention)
AttentionMaskInterface.register(LATENT_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
