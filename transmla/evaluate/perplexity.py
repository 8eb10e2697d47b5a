"""Perplexity of a causal language model over windows of a token stream, and its distance to a baseline."""

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

# Positions whose logits are held in float32 at once: 256 x 128k words are 128 MiB.
CHUNK = 256


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; means are over the counted predictions."""

    perplexity: float  # exp(nll)
    nll: float  # mean negative log-likelihood, nats per token
    tokens: int  # predictions counted
    windows: int
    window: int  # tokens per window
    stride: int  # tokens between the starts of two windows
    baseline_perplexity: float | None
    kl: float | None  # mean KL(baseline || model), nats per token
    top1_agreement: float | None  # share of predictions whose most likely token is the same
    seconds: float

    def to_dict(self) -> dict[str, Any]:
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
    """Score `tokens` (integer [N]) in windows `tokens[i * stride : i * stride + window]`, each on its own.

    With `stride` equal to `window` (the default) every prediction counts; with a smaller one, a later
    window's last `stride` predictions do. Tokens that fill no window are left out; a text shorter than one
    window is one window. Both models may sit on different devices, in different dtypes; they are run in
    evaluation mode and put back. `progress` gets (windows done, windows) after each batch.

    Raises TransmlaError for a text under 2 tokens, numbers out of range, a stride over the window, a window
    over a model's context, tokens a model does not have, and different vocabularies.
    """
    if tokens.dim() != 1 or len(tokens) < 2:
        raise TransmlaError(f"tokens of shape {list(tokens.shape)}", limit="one row of at least 2 is needed")
    check_stride(window, stride)
    window = min(window, len(tokens))
    stride = window if stride is None else min(stride, window)
    if window < 2 or stride < 1 or batch_size < 1 or (max_windows is not None and max_windows < 1):
        raise TransmlaError(
            f"window {window}, stride {stride}, batch size {batch_size}, at most {max_windows} windows",
            limit="a window has at least 2 tokens, the others are at least 1",
        )
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


def check_stride(window: int, stride: int | None) -> None:
    """Refuse windows with gaps between them."""
    if stride is not None and stride > window:
        raise TransmlaError(
            f"stride {stride} is larger than the window",
            limit=f"windows of {window} tokens would leave out the text between them",
            remedy="lower the stride, or leave it out",
        )


def check_model(model: nn.Module, tokens: Tensor, window: int, name: str = "model") -> None:
    """Refuse a window that `model` was not made for, and tokens that it does not know."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise TransmlaError(
            f"a window of {window} tokens is longer than the {name}'s context",
            limit=f"max_position_embeddings is {longest}",
            remedy=f"use a window of at most {longest}",
        )
    words, highest = getattr(config, "vocab_size", None), int(tokens.max())
    if words is not None and highest >= words:
        raise TransmlaError(
            f"the text holds token {highest}",
            limit=f"the {name}'s vocabulary has {words} entries",
            remedy="use the tokenizer that belongs to the model",
        )


def _batches(windows: int, batch_size: int, *, overlapping: bool) -> Iterator[tuple[int, int]]:
    """Ranges of windows; of overlapping ones the first, which counts more predictions, goes alone."""
    first = 0
    while first < windows:
        last = 1 if overlapping and first == 0 else min(first + batch_size, windows)
        yield first, last
        first = last


def _score(sums: _Sums, model: nn.Module, baseline: nn.Module | None, windows: Tensor, skip: int) -> None:
    """Add a batch (integer [B, window]) to the sums, leaving out each window's first `skip` predictions."""
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
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=windows.to(device), use_cache=False).logits
    return logits


def _exp(nll: float) -> float:
    """exp that reaches infinity instead of overflowing: a broken model is a result too."""
    return math.exp(nll) if nll < 700 else math.inf
