"""Perplexity of a causal language model over windows of a token stream, and its KL divergence from a baseline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from transmla.errors import TransmlaError
from transmla.evaluate.scores import PositionBin, Scores, flat_means
from transmla.evaluate.windows import Windows, cut_windows
from transmla.source.load import eval_mode

# Positions whose logits are in float32 at the same time: 256 positions of a 128k vocabulary take 128 MiB.
CHUNK = 256


@dataclass(frozen=True)
class Evaluation:
    """Result of ``evaluate``.

    All means are over the counted predictions. A standard error (``…_stderr``) has the windows as its sampling unit,
    and is None for a single window. The perplexities' standard errors follow from those of the nll by the delta method.
    What compares with a baseline is None without one.

    Attributes:
        perplexity: exp(``nll``).
        nll: mean negative log-likelihood, in nats per token.
        baseline_perplexity: perplexity of the baseline.
        baseline_nll: ``nll`` of the baseline.
        nll_difference: ``nll`` less the baseline's. Its standard error is that of the windows' differences.
        kl: mean KL(baseline ‖ model), in nats per token.
        top1_agreement: share of predictions with the same most likely token in both models.
        tokens: counted predictions.
        windows: number of windows.
        window: tokens per window.
        stride: text tokens between the starts of two windows.
        starts_with_bos: whether every window starts with BOS.
        positions: means by position in the window.
        seconds: time of the evaluation.
    """

    perplexity: float
    perplexity_stderr: float | None
    nll: float
    nll_stderr: float | None
    baseline_perplexity: float | None
    baseline_perplexity_stderr: float | None
    baseline_nll: float | None
    baseline_nll_stderr: float | None
    nll_difference: float | None
    nll_difference_stderr: float | None
    kl: float | None
    kl_stderr: float | None
    top1_agreement: float | None
    top1_agreement_stderr: float | None
    tokens: int
    windows: int
    window: int
    stride: int
    starts_with_bos: bool
    positions: list[PositionBin]
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
    bos: int | None = None,
    baseline: nn.Module | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a text in independent windows (see ``cut_windows``).

    The models may have different devices and dtypes. Both run in evaluation mode, and their modes are restored.

    Args:
        model: the causal LM to evaluate.
        tokens: the text (integer [N]). A ``bos`` in front of it is left out.
        window: tokens per window, with BOS.
        max_windows: largest number of windows; None: all.
        stride: text tokens between the starts of two windows; None: windows do not overlap.
        bos: token that every window starts with; None: windows hold text tokens only.
        baseline: the causal LM to compare with, or None.
        batch_size: windows per forward pass.
        progress: called with (finished windows, all windows) after each batch.

    Raises:
        TransmlaError: for fewer than 2 tokens, a number out of range, a stride above the window, a window above a
            model's context, a token outside a vocabulary, or models with different vocabularies.
    """
    if batch_size < 1:
        raise TransmlaError(f"batch size {batch_size}", limit="a batch has at least 1 window")
    windows = cut_windows(tokens, window, stride=stride, max_windows=max_windows, bos=bos)
    check_config(getattr(model, "config", None), windows)
    if baseline is not None:
        check_config(getattr(baseline, "config", None), windows, "baseline")
    started = time.perf_counter()
    sums, scores = _Sums(), Scores(windows.count, windows.size)
    with eval_mode(model), eval_mode(baseline):
        for first, last in windows.batches(batch_size):
            _score(sums, scores, model, baseline, windows, first, last)
            if progress:
                progress(last, windows.count)
    return _result(sums, scores, windows, compared=baseline is not None, seconds=time.perf_counter() - started)


def _result(sums: _Sums, scores: Scores, windows: Windows, *, compared: bool, seconds: float) -> Evaluation:
    values = {"nll": sums.nll}
    if compared:
        difference = sums.nll - sums.baseline_nll
        values |= {"baseline_nll": sums.baseline_nll, "nll_difference": difference}
        values |= {"kl": sums.kl, "top1_agreement": sums.agreed}
    means = {name: value / sums.tokens for name, value in values.items()}
    return Evaluation(
        **flat_means(means, {name: scores.stderr(name) for name in means}),
        tokens=sums.tokens,
        windows=windows.count,
        window=windows.size,
        stride=windows.stride,
        starts_with_bos=windows.bos is not None,
        positions=scores.positions(compared=compared),
        seconds=seconds,
    )


def check_config(config: Any, windows: Windows, name: str = "model") -> None:
    """Check that a model supports the windows' length and tokens.

    Args:
        config: config of a causal LM in transformers. None, as any attribute that it lacks, is not checked.
        windows: the windows.
        name: role of the model in error messages.

    Raises:
        TransmlaError: if a window exceeds the model's context, or a token is outside its vocabulary.
    """
    config = text_config(config)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and windows.size > longest:
        raise TransmlaError(
            f"a window of {windows.asked} tokens is longer than the {name}'s context",
            limit=f"max_position_embeddings is {longest}",
            remedy=f"use a window of at most {longest}",
        )
    vocabulary, highest = getattr(config, "vocab_size", None), max(int(windows.text.max()), windows.bos or 0)
    if vocabulary is not None and highest >= vocabulary:
        raise TransmlaError(
            f"the text holds token {highest}",
            limit=f"the {name}'s vocabulary has {vocabulary} entries",
            remedy="use the tokenizer that belongs to the model",
        )


def check_vocabularies(model: int | None, baseline: int | None) -> None:
    """Check that model and baseline predict over vocabularies of the same size; None is not checked.

    Raises:
        TransmlaError: if the sizes differ.
    """
    if model is not None and baseline is not None and model != baseline:
        raise TransmlaError(
            f"the baseline's vocabulary has {baseline} entries, the model's {model}",
            remedy="compare a model with the one it was converted from",
        )


def text_config(config: Any) -> Any:
    """Return the part of a transformers config that describes the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _score(
    sums: _Sums, scores: Scores, model: nn.Module, baseline: nn.Module | None, windows: Windows, first: int, last: int
) -> None:
    """Add the windows from ``first`` to before ``last`` to ``sums`` and ``scores``."""
    tokens = windows.tokens(first, last)
    logits = _logits(model, tokens)
    reference = None if baseline is None else _logits(baseline, tokens)
    if reference is not None:
        check_vocabularies(logits.shape[-1], reference.shape[-1])
    targets = tokens[:, 1:].to(logits.device)
    for begin in range(windows.skipped(first), targets.shape[1], CHUNK):
        chunk = slice(begin, min(begin + CHUNK, targets.shape[1]))
        chosen = targets[:, chunk].unsqueeze(-1)
        log_p = logits[:, chunk].float().log_softmax(dim=-1)
        picked = log_p.gather(-1, chosen)
        values = [-picked.squeeze(-1)]
        sums.tokens += chosen.numel()
        sums.nll -= picked.sum().item()
        if reference is not None:
            log_q = reference[:, chunk].to(logits.device).float().log_softmax(dim=-1)
            picked_q = log_q.gather(-1, chosen)
            agreed = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
            divergence = kl_div(log_p, log_q, reduction="none", log_target=True)
            sums.baseline_nll -= picked_q.sum().item()
            sums.agreed += int(agreed.sum().item())
            sums.kl += divergence.sum().item()
            values += [-picked_q.squeeze(-1), divergence.sum(-1), agreed.float()]
        scores.add(first, begin + 1, torch.stack(values, dim=-1))


def _logits(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the logits [B, window, V] on the model's device."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=windows.to(device), use_cache=False).logits
    return logits
