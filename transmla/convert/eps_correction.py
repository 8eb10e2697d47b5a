"""The factor on a norm's weight that corrects for a changed eps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.ranks import Ranks


@dataclass
class NormRatio:
    """Running mean and spread, over tokens, of the ratio sqrt((m + target_eps)/(m + eps)) with m = mean(x²).

    An RMSNorm with ``target_eps`` gives a token the source's output if its weight is multiplied by this ratio.

    Attributes:
        eps: eps of the source's norm.
        target_eps: eps of the export's norm.
        total: sum of the ratios.
        squares: sum of their squares.
        count: number of tokens.
    """

    eps: float
    target_eps: float
    total: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Add the tokens of the norm's input ``x`` [..., D]."""
        mean_square = x.square().mean(-1).double()
        ratio = ((mean_square + self.target_eps) / (mean_square + self.eps)).sqrt()
        self.total += float(ratio.sum())
        self.squares += float(ratio.square().sum())
        self.count += ratio.numel()

    def add_up(self, ranks: Ranks, device: torch.device) -> None:
        """Add the tokens that the other processes have seen; they exchange tensors from ``device``."""
        sums = torch.tensor([self.total, self.squares, self.count], dtype=torch.float64, device=device)
        ranks.add_up(sums)
        self.total, self.squares, count = sums.tolist()
        self.count = int(count)

    @property
    def correction(self) -> float:
        """Factor on the norm's weight that corrects the change of eps on average."""
        return self.total / self.count

    @property
    def residual(self) -> float:
        """Root mean square of the relative error that remains after the correction."""
        return max(self.squares / self.count - self.correction**2, 0.0) ** 0.5 / self.correction
