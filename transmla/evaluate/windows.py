"""Windows: the parts of a text that a model reads one at a time, and the predictions that count in each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transmla.errors import TransmlaError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Windows of equal size over a text.

    The first window counts all its predictions. If windows overlap, each later one counts its last ``stride``
    predictions. No text token is predicted twice. Tokens after the last full window are left out.

    Attributes:
        text: text tokens, without BOS (integer [N]).
        size: tokens per window, with BOS.
        stride: text tokens between the starts of two windows.
        bos: token that every window starts with, or None.
        count: number of windows.
        asked: tokens per window that were asked for: more than ``size`` if the text is shorter than a window.
    """

    text: Tensor
    size: int
    stride: int
    bos: int | None
    count: int
    asked: int

    @property
    def overlapping(self) -> bool:
        """Whether two consecutive windows share text tokens."""
        return self.stride < self.size - (self.bos is not None)

    def batches(self, batch_size: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of windows. If windows overlap, the first one counts more predictions and is a batch alone."""
        first = 0
        while first < self.count:
            last = 1 if self.overlapping and first == 0 else min(first + batch_size, self.count)
            yield first, last
            first = last

    def tokens(self, first: int, last: int) -> Tensor:
        """Return the windows from ``first`` to before ``last`` (integer [last - first, size])."""
        import torch

        text = self.text.unfold(0, self.size - (self.bos is not None), self.stride)[first:last]
        return text if self.bos is None else torch.cat([text.new_full((len(text), 1), self.bos), text], dim=1)

    def skipped(self, window: int) -> int:
        """Return the number of predictions at the start of a window that do not count, for a window's index."""
        return self.size - 1 - self.stride if window > 0 and self.overlapping else 0


def cut_windows(
    tokens: Tensor, window: int, *, stride: int | None = None, max_windows: int | None = None, bos: int | None = None
) -> Windows:
    """Cut a text into windows. A text shorter than a window is one window.

    Without BOS, window i holds ``tokens[i * stride : i * stride + window]``. With BOS, it holds BOS and
    ``tokens[i * stride : i * stride + window - 1]``.

    Args:
        tokens: the text (integer [N]). A ``bos`` in front of it is left out.
        window: tokens per window, with BOS.
        stride: text tokens between the starts of two windows; None, or more than the text tokens of a window: windows
            do not overlap.
        max_windows: largest number of windows; None: all.
        bos: token that every window starts with, or None.

    Raises:
        TransmlaError: for fewer than 2 tokens with BOS, a number out of range, or a stride above the window.
    """
    check_stride(window, stride)
    if window < 2 or (stride is not None and stride < 1) or (max_windows is not None and max_windows < 1):
        raise TransmlaError(
            f"window {window}, stride {stride}, at most {max_windows} windows",
            limit="a window has at least 2 tokens, and the other numbers are at least 1",
        )
    head = int(bos is not None)
    text = tokens[1:] if bos is not None and tokens[:1].tolist() == [bos] else tokens
    if text.dim() != 1 or len(text) + head < 2:
        raise TransmlaError(f"tokens have shape {list(text.shape)}", limit="one row of at least 2 tokens is needed")
    width = min(window - head, len(text))
    step = width if stride is None else min(stride, width)
    count = (len(text) - width) // step + 1
    count = count if max_windows is None else min(count, max_windows)
    return Windows(text, width + head, step, bos, count, asked=window)


def tokens_needed(window: int, stride: int | None, max_windows: int | None, bos: int | None) -> int | None:
    """Return the number of tokens, with one BOS, that ``max_windows`` windows read; None: the whole text."""
    if max_windows is None:
        return None
    width = window - (bos is not None)
    return window + (max_windows - 1) * min(stride or width, width)


def check_stride(window: int, stride: int | None) -> None:
    """Check that windows have no gaps between them.

    Raises:
        TransmlaError: if ``stride`` is larger than ``window`` (both in tokens).
    """
    if stride is not None and stride > window:
        raise TransmlaError(
            f"stride {stride} is larger than the window",
            limit=f"windows of {window} tokens would leave out the text between them",
            remedy="lower the stride, or omit it",
        )
