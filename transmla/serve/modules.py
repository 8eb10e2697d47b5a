"""Modules of a served latent attention that vLLM and SGLang do not have.

Shapes: T tokens, H heads of one device, D_R padded width of the rotary key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transmla.serve.widen import rotary_table, rotate


class Rotary(nn.Module):
    """Rotary embedding with an export's frequencies. Channels i and i + D_R / 2 are a pair.

    Args:
        kind: the layer's entry in the config's ``mla["kinds"]``.
        width: padded width D_R.
    """

    def __init__(self, kind: Mapping[str, Any], width: int) -> None:
        super().__init__()
        self.factor = kind["attention_factor"]
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", rotary_table(kind["inv_freq"], width), persistent=False)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate ``query`` [T, H, D_R] and ``key`` [T, 1, D_R] of the tokens at ``positions`` [T]."""
        angles = positions[:, None, None].float() * self.inv_freq
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        return rotate(query, cos, sin), rotate(key, cos, sin)


class PerHead(nn.Module):
    """Separate linear map for each head, [T, H, d] → [T, H, n], with weight [H · n, d].

    Args:
        heads, width, rows: H, d and n.
        rank: function that returns the index of this device among those that share the heads.
    """

    def __init__(self, heads: int, width: int, rows: int, rank: Callable[[], int]) -> None:
        super().__init__()
        self.heads, self.rank = heads, rank
        self.weight = nn.Parameter(torch.empty(heads * rows, width), requires_grad=False)
        # The runtimes call the weight's loader with the tensor of all devices' heads.
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, weight: Tensor, loaded: Tensor) -> None:
        """Copy this device's heads of ``loaded`` into ``weight``."""
        rows = weight.shape[0]
        weight.data.copy_(loaded[self.rank() * rows :][:rows])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [T, H, d] to [T, H, n]."""
        heads = self.weight.unflatten(0, (self.heads, -1))
        return (x.transpose(0, 1) @ heads.mT).transpose(0, 1)
