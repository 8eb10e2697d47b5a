"""Make new inputs for a fit from little calibration text.

A step joins pieces of several sequences, moves each token a little along the difference of two other tokens, and keeps
a random share of the accumulated error. Most steps are shorter than the sequences: their pieces have gaps of positions
between them, so that a short step still shows all distances (positional skip-wise training, arXiv 2309.10400).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.plan.fit_settings import SHORT, WHOLE_EVERY

# Approximate length, in tokens, of the pieces of sequences that an input is joined from.
PIECE = 256
# Largest displacement of a token's hidden state, as a share of its norm.
JITTER = 0.2


@dataclass(frozen=True)
class FitInputs:
    """Maker of the inputs of a fit, for steps of one size.

    Attributes:
        source: hidden states [N, T, D] that enter the first layer in the source.
        drift: hidden states of the export minus those of the source [N, T, D]: the error of all earlier layers.
        rows: number of input sequences in one step, n.
        length: tokens in each of them, L ≤ T.
    """

    source: Tensor
    drift: Tensor
    rows: int
    length: int

    def draw(self, steps: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw the arguments of ``make`` for all steps, on the CPU.

        Returns:
            rows, cuts, gaps, shares and shifts, each [steps, …].
        """
        count, length = len(self.source), self.length
        slack = self.source.shape[1] - length
        pieces = max(2, length // PIECE)
        rows = torch.randint(count, (steps, self.rows, pieces), generator=generator)
        cuts = torch.randint(1, length, (steps, pieces - 1), generator=generator)
        gaps = torch.zeros(steps, pieces, dtype=torch.int64)
        if slack:
            # Some steps spread over the whole sequence, others are nearly contiguous.
            spread = torch.rand(steps, pieces - 1, generator=generator) * torch.rand(steps, 1, generator=generator)
            gaps[:, 1:] = spread.sort(-1).values.mul(slack).long()
        shares = torch.rand(steps, self.rows, generator=generator)
        shifts = torch.randint(1, self.rows * length, (steps, 2), generator=generator)
        return rows, cuts, gaps, shares, shifts

    def make(
        self,
        rows: Tensor,
        cuts: Tensor,
        gaps: Tensor,
        shares: Tensor,
        shifts: Tensor,
        *,
        part: tuple[slice, slice] = (slice(None), slice(None)),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make the inputs of one step, or a part of them.

        Args:
            rows: indices [n, pieces] of the sequences that each input is joined from. Tokens keep their positions.
            cuts: tokens [pieces − 1] of an input at which one piece ends and the next begins.
            gaps: positions [pieces] that are left out before each piece, in all; the first is 0.
            shares: share [n] of the drift that each input keeps.
            shifts: offsets [2] of the two tokens whose difference a token is moved along.
            part: which inputs and which of their tokens to make.

        Returns:
            Hidden states [n, L, D] that enter the first layer in the source and in the export, and their positions [L].
            Of a part, n and L count its own inputs and tokens.
        """
        index = torch.arange(self.length, device=self.source.device)
        piece = (index[:, None] >= cuts).sum(-1)
        positions, row = index + gaps[piece], rows[:, piece]
        count, (inputs, tokens) = row.numel(), part
        own = torch.arange(count, device=index.device).view_as(row)[part]
        source, first, second = (
            self.source[row.flatten()[token], positions[token % self.length]]
            for token in (own, *((own + shift) % count for shift in shifts))
        )
        step = first - second
        limit = source.norm(dim=-1, keepdim=True) / step.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        moved = source + JITTER * step * limit.clamp_max(1)
        drift = self.drift[row[part], positions[tokens]]
        return moved, moved + drift * shares[inputs, None, None], positions[tokens]


def sizes_of_steps(source: Tensor, drift: Tensor, tokens: int) -> tuple[FitInputs, ...]:
    """Return the makers of the inputs of each kind of step: of whole sequences and, if these are long, of short rows.

    Args:
        source: hidden states [N, T, D] that enter the first layer in the source.
        drift: hidden states of the export minus those of the source [N, T, D].
        tokens: tokens in one step, rounded down to whole rows, but at least one row.
    """
    count, length = source.shape[:2]
    lengths = (length, SHORT) if length >= 2 * SHORT else (length,)
    return tuple(FitInputs(source, drift, max(1, min(tokens // each, count)), each) for each in lengths)


def kinds_of_steps(steps: int, kinds: int) -> list[int]:
    """Return for each step which of the ``sizes_of_steps`` it takes."""
    return [0 if kinds == 1 or step % WHOLE_EVERY == WHOLE_EVERY - 1 else 1 for step in range(steps)]
