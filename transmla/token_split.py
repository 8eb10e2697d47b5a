"""Split sequences by tokens over processes, and by heads where tokens meet: in the attention (arXiv 2309.14509)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from transmla.ranks import Ranks


@dataclass(frozen=True)
class TokenSplit:
    """One process's span of sequences that several processes share.

    Attributes:
        ranks: the processes; each of them has at least one token and one head.
        length: tokens in a whole sequence, T.
    """

    ranks: Ranks
    length: int

    @property
    def tokens(self) -> slice:
        """The tokens of this process; t of them."""
        return self.ranks.share(self.length)

    def heads(self, count: int) -> slice:
        """Return which of ``count`` heads this process attends with."""
        return self.ranks.share(count)

    def positions(self, device: torch.device) -> Tensor:
        """Return the positions [t] of this process's tokens in a sequence without gaps."""
        return torch.arange(self.tokens.start, self.tokens.stop, device=device)

    def to_heads(self, x: Tensor) -> Tensor:
        """Exchange all heads of own tokens [N, H, t, d] for own heads of all tokens [N, h, T, d]; differentiable."""
        return _ToHeads.apply(x, self)  # type: ignore[no-any-return]

    def to_tokens(self, x: Tensor, heads: int) -> Tensor:
        """Undo ``to_heads`` for H = ``heads``: [N, h, T, d] → [N, H, t, d]; differentiable."""
        return _ToTokens.apply(x, self, heads)  # type: ignore[no-any-return]

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over the tokens of all processes, for x [..., t, d] without gradient; [..., 1, d]."""
        total = x.sum(-2, keepdim=True)
        self.ranks.add_up(total)
        return total / self.length

    def gather_tokens(self, x: Tensor) -> Tensor:
        """Compute ``to_heads``."""
        own = self.heads(x.shape[1])
        parts = [x[:, self.ranks.share_of(rank, x.shape[1])] for rank in range(self.ranks.size)]
        spans = [self.ranks.share_of(rank, self.length) for rank in range(self.ranks.size)]
        shapes = [(len(x), own.stop - own.start, span.stop - span.start, x.shape[3]) for span in spans]
        return torch.cat(_exchanged(parts, shapes), 2)

    def gather_heads(self, x: Tensor, heads: int) -> Tensor:
        """Compute ``to_tokens``."""
        own = self.tokens
        parts = [x[:, :, self.ranks.share_of(rank, self.length)] for rank in range(self.ranks.size)]
        shares = [self.ranks.share_of(rank, heads) for rank in range(self.ranks.size)]
        shapes = [(len(x), share.stop - share.start, own.stop - own.start, x.shape[3]) for share in shares]
        return torch.cat(_exchanged(parts, shapes), 1)


def _exchanged(parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Send ``parts[r]`` to process r, and return what each process sent to this one, in ``shapes``."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    received = parts[0].new_empty(sum(sizes))
    sent = torch.cat([part.flatten() for part in parts])
    distributed.all_to_all_single(received, sent, sizes, [part.numel() for part in parts])
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: TokenSplit) -> Tensor:
        ctx.split, ctx.heads = split, x.shape[1]
        return split.gather_tokens(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.split.gather_heads(gradient, ctx.heads), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: TokenSplit, heads: int) -> Tensor:
        ctx.split = split
        return split.gather_heads(x, heads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.split.gather_tokens(gradient), None, None
