"""The features of a source's attention, and its weights as linear maps of these features.

The mathematics of the conversion needs queries, keys and values that are linear in one input: the features [..., F].
The features are computed from the attention's input x [..., D]. There are three cases:

- Projections without biases: the features are x, so F = D. The maps are the projection weights.
- Projections with biases: the features are x followed by a constant 1, so F = D + 1. The biases are the last column
  of the maps.
- Normed queries and keys: a norm is not linear in x. The features are therefore the normed queries, the normed keys
  and the values, concatenated, so F = (H + 2G)·d. The maps are rows of the identity matrix.

D is the hidden size, H the number of query heads, G the number of key/value heads, d the head width, T the number of
tokens. In *halves layout*, RoPE rotates channel i of a head together with channel i + d/2, as in Llama.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from transmla.artifacts import LayerWeights, ScoreRules
from transmla.modeling.modeling_transmla import has_bias, norm_heads


@dataclass(frozen=True)
class Heads:
    """The heads of one attention.

    Attributes:
        queries: number of query heads, H.
        groups: number of key/value heads, G.
        width: channels in a head, d.
        order: the family's channel for every channel of the halves layout [d].
        rotary_channels: rotary channels; the first ones of a head in the family's order.
        factor: multiplies the rotary channels of queries and keys (an attention factor on a part of the head).
    """

    queries: int
    groups: int
    width: int
    order: tuple[int, ...]
    rotary_channels: int = 0
    factor: float = 1.0


def read_projections(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Return the weights [(H + 2G)·d, D] and biases [(H + 2G)·d] of an attention's queries, keys and values."""
    if hasattr(attention, "qkv_proj"):
        return attention.qkv_proj.weight, attention.qkv_proj.bias
    parts = attention.q_proj, attention.k_proj, attention.v_proj
    bias = torch.cat([part.bias for part in parts]) if has_bias(attention) else None
    return torch.cat([part.weight for part in parts]), bias


class AttentionView:
    """The features and the linear maps of one attention module.

    Args:
        attention: a family's attention module with its weights loaded.
        heads: the heads of the attention.
        rules: what the family does to attention scores before the softmax.
    """

    def __init__(self, attention: Any, heads: Heads, rules: ScoreRules) -> None:
        self.attention, self.heads, self.rules = attention, heads, rules
        self.projection, self.bias = read_projections(attention)
        self.normed = hasattr(attention, "q_norm")
        # A tensor on the device: indexing with a Python list would copy the list to the device in every call.
        # None for families whose heads are in halves layout already: they need no copy.
        self.order = None
        if heads.order != tuple(range(heads.width)):
            self.order = torch.tensor(heads.order, device=self.projection.device)
        self.scale = None
        if heads.factor != 1:
            self.scale = torch.ones(heads.width, device=self.projection.device)
            self.scale[: heads.rotary_channels] = heads.factor

    @property
    def width(self) -> int:
        """Number of features, F."""
        rows, columns = self.projection.shape
        return rows if self.normed else columns + (self.bias is not None)

    @property
    def own(self) -> int | None:
        """Number of features that only one query head reads; None if all heads read all features."""
        return self.heads.width if self.normed else None

    def features(self, x: Tensor) -> Tensor:
        """Return the features [..., F] of the attention's input x [..., D]."""
        if not self.normed:
            return x if self.bias is None else pad(x, (0, 1), value=1.0)
        h, d = self.heads, self.heads.width
        q, k, v = linear(x, self.projection, self.bias).split([h.queries * d, h.groups * d, h.groups * d], -1)
        q, k = norm_heads(self.attention.q_norm, q, d), norm_heads(self.attention.k_norm, k, d)
        return torch.cat([q, k, v], -1)

    def blocks(self) -> Tensor | None:
        """Return the block number of every feature [F], or None when the features form a single block.

        With normed queries and keys, block h < H holds the features of query head h. Block H holds the features of
        all keys and values.
        """
        if not self.normed:
            return None
        h = self.heads
        counts = torch.tensor([h.width] * h.queries + [2 * h.groups * h.width], device=self.projection.device)
        return torch.arange(h.queries + 1, device=counts.device).repeat_interleave(counts)

    def masks(self) -> dict[str, Tensor]:
        """Return, by the name of a factor, a mask that is True for the features that the factor may read.

        The masks are [H, 1, F] for ``q_nope`` and ``q_pe``, and [F] for ``latent`` and ``rope``. The result is empty
        when every factor may read all features.
        """
        blocks = self.blocks()
        if blocks is None:
            return {}
        query_block = torch.arange(self.heads.queries, device=blocks.device)[:, None, None] == blocks
        key_value_block = blocks == self.heads.queries
        return {"q_nope": query_block, "q_pe": query_block, "latent": key_value_block, "rope": key_value_block}

    def heads_of(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [N, H, T, d], keys [N, G, T, d] and values [N, G, T, d] of features [N, T, F].

        Queries and keys are in halves layout. RoPE is not applied. Queries and keys with biases are float32 or wider:
        some of Qwen2.5's biases are hundreds of times as large as what varies between tokens.
        """
        h = self.heads
        rows = features if self.normed else linear(features[..., : self.projection.shape[1]], self.projection)
        counts = [h.queries, h.groups, h.groups]
        q, k, v = rows.unflatten(-1, (-1, h.width)).transpose(1, 2).split(counts, 1)
        if self.bias is not None and not self.normed:
            wide = torch.promote_types(rows.dtype, torch.float32)
            bias_q, bias_k, bias_v = self.bias.unflatten(0, (-1, 1, h.width)).split(counts)
            q, k, v = q.to(wide) + bias_q, k.to(wide) + bias_k, v + bias_v.to(v.dtype)
        if self.scale is not None:
            q, k = q * self.scale, k * self.scale
        if self.order is None:
            return q, k, v
        return q.index_select(-1, self.order), k.index_select(-1, self.order), v

    def weights(self) -> LayerWeights:
        """Return the attention's weights as maps of the features, in float32.

        q is [H, d, F], k and v are [G, d, F], o is [H, D, d]. Queries and keys are in halves layout.
        """
        h, d = self.heads, self.heads.width
        if self.normed:
            maps = torch.eye(self.width, device=self.projection.device)
        else:
            maps = self.projection.detach().float()
            if self.bias is not None:
                maps = torch.cat([maps, self.bias.detach().float()[:, None]], 1)
        q, k, v = maps.unflatten(0, (-1, d)).split([h.queries, h.groups, h.groups])
        if self.scale is not None:
            q, k = q * self.scale[:, None], k * self.scale[:, None]
        order = list(h.order)
        o = self.attention.o_proj.weight.detach().float().unflatten(1, (h.queries, d)).transpose(0, 1)
        return LayerWeights(q[:, order], k[:, order], v, o, self.rules)


def halves_order(width: int, rotary_channels: int, *, interleaved: bool) -> tuple[int, ...]:
    """Return the channel order [width] that brings a head into halves layout.

    The channels that RoPE does not rotate are paired too, after the rotary pairs; their frequency is 0.

    Args:
        width: channels in a head.
        rotary_channels: rotary channels; they are the first ones of the head.
        interleaved: whether RoPE rotates channel 2i together with channel 2i + 1, instead of the two halves.

    Raises:
        ValueError: if ``width`` or ``rotary_channels`` is odd.
    """
    if width % 2 or rotary_channels % 2:
        raise ValueError(f"{rotary_channels} of {width} channels cannot be paired")
    pairs = [(i, i + rotary_channels // 2) for i in range(rotary_channels // 2)]
    if interleaved:
        pairs = [(2 * i, 2 * i + 1) for i in range(rotary_channels // 2)]
    rest = (width - rotary_channels) // 2
    pairs += [(rotary_channels + i, rotary_channels + rest + i) for i in range(rest)]
    return tuple(channel for half in zip(*pairs, strict=True) for channel in half)
