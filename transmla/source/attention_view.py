"""What a source's attention is linear in: its features, and its weights as maps of them.

All mathematics of conversion is of maps that read one input. That input are the hidden states; where there are biases,
with a one behind them, so that a bias is one more column; and where queries and keys are normed, which no map of the
hidden states can be, the normed queries, the normed keys and the values themselves.
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
    """Numbers of query and key/value heads, their width, and the order [d] that puts a head's channels in halves.

    The first ``turned`` channels of queries and keys count ``factor`` times.
    """

    queries: int
    groups: int
    width: int
    order: tuple[int, ...]
    turned: int = 0
    factor: float = 1.0


def read_projections(attention: Any) -> tuple[Tensor, Tensor | None]:
    """Weights [(H + 2G)·d, D] and biases [(H + 2G)·d] of queries, keys and values of a family's ``attention``."""
    if hasattr(attention, "qkv_proj"):
        return attention.qkv_proj.weight, attention.qkv_proj.bias
    parts = attention.q_proj, attention.k_proj, attention.v_proj
    bias = torch.cat([part.bias for part in parts]) if has_bias(attention) else None
    return torch.cat([part.weight for part in parts]), bias


class AttentionView:
    """The features of one ``attention``, whose weights are there."""

    def __init__(self, attention: Any, heads: Heads, rules: ScoreRules) -> None:
        self.attention, self.heads, self.rules = attention, heads, rules
        self.projection, self.bias = read_projections(attention)
        self.normed = hasattr(attention, "q_norm")
        # A list would be sent to the device at every use; and most families need no other order at all.
        self.order = None
        if heads.order != tuple(range(heads.width)):
            self.order = torch.tensor(heads.order, device=self.projection.device)
        self.scale = None
        if heads.factor != 1:
            self.scale = torch.ones(heads.width, device=self.projection.device)
            self.scale[: heads.turned] = heads.factor

    @property
    def width(self) -> int:
        """Number of features."""
        rows, columns = self.projection.shape
        return rows if self.normed else columns + (self.bias is not None)

    def features(self, x: Tensor) -> Tensor:
        """Features [..., F] of what enters the attention, [..., D]."""
        if not self.normed:
            return x if self.bias is None else pad(x, (0, 1), value=1.0)
        h, d = self.heads, self.heads.width
        q, k, v = linear(x, self.projection, self.bias).split([h.queries * d, h.groups * d, h.groups * d], -1)
        q, k = norm_heads(self.attention.q_norm, q, d), norm_heads(self.attention.k_norm, k, d)
        return torch.cat([q, k, v], -1)

    def blocks(self) -> Tensor | None:
        """Which part of the attention a feature [F] belongs to: a query head, or (H) keys and values; None for one."""
        if not self.normed:
            return None
        h = self.heads
        counts = torch.tensor([h.width] * h.queries + [2 * h.groups * h.width], device=self.projection.device)
        return torch.arange(h.queries + 1, device=counts.device).repeat_interleave(counts)

    def masks(self) -> dict[str, Tensor]:
        """By the names of factors, where they may read features; empty where that is everywhere."""
        blocks = self.blocks()
        if blocks is None:
            return {}
        own = torch.arange(self.heads.queries, device=blocks.device)[:, None, None] == blocks
        shared = blocks == self.heads.queries
        return {"q_nope": own, "q_pe": own, "latent": shared, "rope": shared}

    def heads_of(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, T, d], keys and values [N, G, T, d], queries and keys in halves, of features [N, T, F]."""
        h = self.heads
        rows = features
        if not self.normed:
            rows = linear(features[..., : self.projection.shape[1]], self.projection, self.bias)
        counts = [h.queries, h.groups, h.groups]
        q, k, v = rows.unflatten(-1, (-1, h.width)).transpose(1, 2).split(counts, 1)
        if self.scale is not None:
            q, k = q * self.scale, k * self.scale
        if self.order is None:
            return q, k, v
        return q.index_select(-1, self.order), k.index_select(-1, self.order), v

    def weights(self) -> LayerWeights:
        """Queries, keys and values as maps of the features, float32, channels of queries and keys in halves."""
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


def halves_order(width: int, turned: int, *, interleaved: bool) -> tuple[int, ...]:
    """Channels [width] in halves layout, of which the first ``turned`` are; the others become pairs that stand still.

    Raises:
        ValueError: for an odd number of either.
    """
    if width % 2 or turned % 2:
        raise ValueError(f"{turned} of {width} channels cannot be paired")
    pairs = [(i, i + turned // 2) for i in range(turned // 2)]
    if interleaved:
        pairs = [(2 * i, 2 * i + 1) for i in range(turned // 2)]
    rest = (width - turned) // 2
    pairs += [(turned + i, turned + rest + i) for i in range(rest)]
    return tuple(channel for half in zip(*pairs, strict=True) for channel in half)
