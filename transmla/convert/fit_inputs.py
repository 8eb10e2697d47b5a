"""Make new inputs for a fit from little calibration text.

A step joins pieces of several sequences, moves each token a little along the difference of two other tokens, and keeps
a random share of the accumulated error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Approximate length, in tokens, of the pieces of sequences that an input is joined from.
PIECE = 256
# Largest displacement of a token's hidden state, as a share of its norm.
JITTER = 0.2


@dataclass(frozen=True)
class FitInputs:
    """Maker of the inputs of a fit.

    Attributes:
        source: hidden states [N, T, D] that enter the first layer in the source.
        drift: hidden states of the export minus those of the source [N, T, D]: the error of all earlier layers.
        rows: number of input sequences in one step.
    """

    source: Tensor
    drift: Tensor
    rows: int

    def draw(self, steps: int, seed: int) -> tuple[Tensor, ...]:
        """Draw the arguments of ``make`` for all steps, on the CPU.

        Returns:
            rows, cuts, shares and shifts, each [steps, …].
        """
        generator = torch.Generator().manual_seed(seed)
        count, length = self.source.shape[:2]
        pieces = max(2, length // PIECE)
        rows = torch.randint(count, (steps, self.rows, pieces), generator=generator)
        cuts = torch.randint(1, length, (steps, pieces - 1), generator=generator)
        shares = torch.rand(steps, self.rows, generator=generator)
        shifts = torch.randint(1, self.rows * length, (steps, 2), generator=generator)
        return rows, cuts, shares, shifts

    def make(self, rows: Tensor, cuts: Tensor, shares: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """Make the inputs of one step.

        Args:
            rows: indices [n, pieces] of the sequences that each input is joined from. Tokens keep their positions.
            cuts: positions [pieces − 1] at which one piece ends and the next begins.
            shares: share [n] of the drift that each input keeps.
            shifts: offsets [2] of the two tokens whose difference a token is moved along.

        Returns:
            Hidden states [n, T, D] that enter the first layer in the source and in the export.
        """
        positions = torch.arange(self.source.shape[1], device=self.source.device)
        row = rows[:, (positions[:, None] >= cuts).sum(-1)]
        source, drift = self.source[row, positions], self.drift[row, positions]
        tokens = source.flatten(0, 1)
        index = torch.arange(len(tokens), device=tokens.device)
        first, second = ((index + shift) % len(tokens) for shift in shifts)
        step = tokens[first] - tokens[second]
        limit = tokens.norm(dim=-1, keepdim=True) / step.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        moved = (tokens + JITTER * step * limit.clamp_max(1)).view_as(source)
        return moved, moved + drift * shares[:, None, None]
