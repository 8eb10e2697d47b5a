"""Perplexity of a causal language model over windows of a token stream, and its KL divergence from a baseline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from transmla.errors import TransmlaError
from transmla.source.load import eval_mode

# Positions whose logits are in float32 at the same time: 256 positions of a 128k vocabulary take 128 MiB.
CHUNK = 256


@dataclass(frozen=True)
class Evaluation:
    """Result of ``evaluate``; all means are over the counted predictions.

    Attributes:
        perplexity: exp(``nll``).
        nll: mean negative log-likelihood, in nats per token.
        tokens: counted predictions.
        windows: number of windows.
        window: tokens per window.
        stride: tokens between the starts of two windows.
        baseline_perplexity: perplexity of the baseline, or None.
        kl: mean KL(baseline ‖ model), in nats per token, or None.
        top1_agreement: share of predictions with the same most likely token in both models, or None.
        seconds: time of the evaluation.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    window: int
    stride: int
    baseline_perplexity: float | None
    kl: float | None
    top1_agreement: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass
class _Sums:
    tokens: int = 0
    nll: float = 0.0
    baseline_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    tokens: Tensor,
    *,
    window: int = 2048,
    max_windows: int | None = None,
    stride: int | None = None,
    baseline: nn.Module | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a token stream in independent windows ``tokens[i * stride : i * stride + window]``.

    The first window counts all its predictions, and each later window the last ``stride`` of them. Without overlap,
    every window counts all. Tokens after the last full window are left out. A text shorter than a window is one window.
    The models may have different devices and dtypes. Both run in evaluation mode, and their modes are restored.

    Args:
        model: the causal LM to evaluate.
        tokens: token stream (integer [N]).
        window: tokens per window.
        max_windows: largest number of windows; None: all.
        stride: tokens between the starts of two windows; None: ``window``, so windows do not overlap.
        baseline: the causal LM to compare with, or None.
        batch_size: windows per forward pass.
        progress: called with (finished windows, all windows) after each batch.

    Raises:
        TransmlaError: for fewer than 2 tokens, a number out of range, a stride above the window, a window above a
            model's context, a token outside a vocabulary, or models with different vocabularies.
    """
    window, stride = _window_sizes(tokens, window, stride, max_windows, batch_size)
    check_model(model, tokens, window)
    if baseline is not None:
        check_model(baseline, tokens, window, "baseline")
    windows = tokens.unfold(0, window, stride)[:max_windows]
    started = time.perf_counter()
    sums = _Sums()
    with eval_mode(model), eval_mode(baseline):
        for first, last in _batches(len(windows), batch_size, overlapping=stride < window):
            skip = window - 1 - stride if first > 0 and stride < window else 0
            _score(sums, model, baseline, windows[first:last], skip)
            if progress:
                progress(last, len(windows))
    compared = baseline is not None
    return Evaluation(
        perplexity=_exp(sums.nll / sums.tokens),
        nll=sums.nll / sums.tokens,
        tokens=sums.tokens,
        windows=len(windows),
        window=window,
        stride=stride,
        baseline_perplexity=_exp(sums.baseline_nll / sums.tokens) if compared else None,
        kl=sums.kl / sums.tokens if compared else None,
        top1_agreement=sums.agreed / sums.tokens if compared else None,
        seconds=time.perf_counter() - started,
    )


def _window_sizes(
    tokens: Tensor, window: int, stride: int | None, max_windows: int | None, batch_size: int
) -> tuple[int, int]:
    """Check the numbers, and return window and stride, neither longer than the text."""
    if tokens.dim() != 1 or len(tokens) < 2:
        raise TransmlaError(f"tokens have shape {list(tokens.shape)}", limit="one row of at least 2 tokens is needed")
    check_stride(window, stride)
    window = min(window, len(tokens))
    stride = window if stride is None else min(stride, window)
    if window < 2 or stride < 1 or batch_size < 1 or (max_windows is not None and max_windows < 1):
        raise TransmlaError(
            f"window {window}, stride {stride}, batch size {batch_size}, at most {max_windows} windows",
            limit="a window has at least 2 tokens, and the other numbers are at least 1",
        )
    return window, stride


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


def check_model(model: nn.Module, tokens: Tensor, window: int, name: str = "model") -> None:
    """Check that a model supports a window length and all tokens of a text.

    Args:
        model: a causal LM; a model without a config passes.
        tokens: the text (integer [N]).
        window: tokens per window.
        name: role of the model in error messages.

    Raises:
        TransmlaError: if ``window`` exceeds the model's context, or a token is outside its vocabulary.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise TransmlaError(
            f"a window of {window} tokens is longer than the {name}'s context",
            limit=f"max_position_embeddings is {longest}",
            remedy=f"use a window of at most {longest}",
        )
    vocabulary, highest = getattr(config, "vocab_size", None), int(tokens.max())
    if vocabulary is not None and highest >= vocabulary:
        raise TransmlaError(
            f"the text holds token {highest}",
            limit=f"the {name}'s vocabulary has {vocabulary} entries",
            remedy="use the tokenizer that belongs to the model",
        )


def _batches(windows: int, batch_size: int, *, overlapping: bool) -> Iterator[tuple[int, int]]:
    """Yield ranges of windows. If windows overlap, the first one counts more predictions and is a batch alone."""
    first = 0
    while first < windows:
        last = 1 if overlapping and first == 0 else min(first + batch_size, windows)
        yield first, last
        first = last


def _score(sums: _Sums, model: nn.Module, baseline: nn.Module | None, windows: Tensor, skip: int) -> None:
    """Add ``windows`` (integer [B, window]) to ``sums``, without each window's first ``skip`` predictions."""
    logits = _logits(model, windows)
    reference = None if baseline is None else _logits(baseline, windows)
    if reference is not None and reference.shape[-1] != logits.shape[-1]:
        raise TransmlaError(
            f"the baseline's vocabulary has {reference.shape[-1]} entries, the model's {logits.shape[-1]}",
            remedy="compare a model with the one it was converted from",
        )
    targets = windows[:, 1:].to(logits.device)
    for begin in range(skip, targets.shape[1], CHUNK):
        chunk = slice(begin, min(begin + CHUNK, targets.shape[1]))
        chosen = targets[:, chunk].unsqueeze(-1)
        log_p = logits[:, chunk].float().log_softmax(dim=-1)
        sums.tokens += chosen.numel()
        sums.nll -= log_p.gather(-1, chosen).sum().item()
        if reference is not None:
            log_q = reference[:, chunk].to(logits.device).float().log_softmax(dim=-1)
            sums.baseline_nll -= log_q.gather(-1, chosen).sum().item()
            sums.agreed += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum().item())
            sums.kl += kl_div(log_p, log_q, reduction="sum", log_target=True).item()


def _logits(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the logits [B, window, V] on the model's device."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=windows.to(device), use_cache=False).logits
    return logits


def _exp(nll: float) -> float:
    """Return exp(nll), or infinity where math.exp would raise: a broken model must also give a result."""
    return math.exp(nll) if nll < 700 else math.inf
