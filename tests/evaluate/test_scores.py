"""Standard errors, windows with BOS and means by position equal direct computations on hand-built windows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_sources import build_model
from torch import Tensor, tensor

from transmla.errors import TransmlaError
from transmla.evaluate import perplexity_and_kl as module
from transmla.evaluate.perplexity_and_kl import evaluate
from transmla.evaluate.scores import MEANS, Scores, flat_means, mean_over_texts, standard_error
from transmla.evaluate.windows import cut_windows, tokens_needed

VOCABULARY, BOS = 60, 7
# (window, stride, BOS): apart, overlapping, and a last window that would not fit.
SHAPES = [(32, None, None), (33, 10, None), (20, None, BOS), (33, 10, BOS), (9, 8, BOS), (17, 1, BOS), (2, None, BOS)]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A model of three layers, and the same model with perturbed weights."""
    model, baseline = (build_model(num_hidden_layers=3, vocab_size=VOCABULARY) for _ in range(2))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for weight in baseline.parameters():
            weight.add_(0.1 * weight.std() * torch.randn_like(weight))
    return model, baseline


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(8, VOCABULARY, (110,), generator=torch.Generator().manual_seed(2))


def hand_built(text: Tensor, window: int, stride: int | None, bos: int | None) -> list[tuple[list[int], int]]:
    """Return every window's tokens, and the number of predictions at its end that count."""
    width = window - (bos is not None)
    step = min(stride or width, width)
    built = []
    for start in range(0, len(text) - width + 1, step):
        tokens = ([] if bos is None else [bos]) + text[start : start + width].tolist()
        built.append((tokens, len(tokens) - 1 if start == 0 or step == width else step))
    return built


@torch.no_grad()
def predictions(models: tuple[Any, Any], tokens: list[int], counted: int) -> dict[str, np.ndarray]:
    """Return the values of a window's counted predictions, from float64 logits, with their positions."""
    p, q = (model(tensor([tokens])).logits[0, :-1].double().log_softmax(-1) for model in models)
    targets = tensor(tokens[1:])[:, None]
    nll, baseline_nll = (-log.gather(-1, targets)[:, 0] for log in (p, q))
    values = {
        "nll": nll,
        "baseline_nll": baseline_nll,
        "nll_difference": nll - baseline_nll,
        "kl": (q.exp() * (q - p)).sum(-1),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "position": torch.arange(1, len(tokens)),
    }
    return {name: value[-counted:].numpy() for name, value in values.items()}


@pytest.mark.parametrize(("chunk", "batch_size"), [(7, 1), (256, 3)])
@pytest.mark.parametrize(("window", "stride", "bos"), SHAPES)
def test_means_errors_and_positions_equal_the_direct_ones(
    models, text, window: int, stride: int | None, bos: int | None, chunk: int, batch_size: int, monkeypatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    found = evaluate(
        models[0], text, window=window, stride=stride, bos=bos, baseline=models[1], batch_size=batch_size
    ).to_dict()
    windows = [predictions(models, tokens, counted) for tokens, counted in hand_built(text, window, stride, bos)]
    everything = {name: np.concatenate([window[name] for window in windows]) for name in windows[0]}
    counts = np.array([len(window["nll"]) for window in windows])

    assert (found["windows"], found["tokens"]) == (len(windows), counts.sum())
    assert found["starts_with_bos"] == (bos is not None)
    for name in MEANS:
        mean = everything[name].mean()
        assert found[name] == pytest.approx(mean, rel=1e-4, abs=1e-6)
        if len(set(counts)) == 1:
            means = np.array([window[name].mean() for window in windows])
            expected = means.std(ddof=1) / np.sqrt(len(means))
        else:
            residuals = np.array([window[name].sum() for window in windows]) - counts * mean
            expected = np.sqrt((residuals**2).sum() * len(counts) / (len(counts) - 1)) / counts.sum()
        assert found[f"{name}_stderr"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found["perplexity_stderr"] == pytest.approx(found["perplexity"] * found["nll_stderr"])
    assert found["baseline_perplexity"] == pytest.approx(math.exp(found["baseline_nll"]))

    assert sum(part["tokens"] for part in found["positions"]) == found["tokens"]
    for name in ("nll", "nll_difference", "kl"):
        total = sum(part[name] * part["tokens"] for part in found["positions"])
        # The means come from float32 sums over a batch, whose rounding is relative to the whole nll.
        rounding = 1e-6 * found["nll"] * found["tokens"]
        assert total == pytest.approx(found[name] * found["tokens"], rel=1e-5, abs=rounding)
    for part in found["positions"]:
        inside = (part["first"] <= everything["position"]) & (everything["position"] <= part["last"])
        assert part["tokens"] == inside.sum()
        assert part["kl"] == pytest.approx(everything["kl"][inside].mean(), rel=1e-4, abs=1e-6)
        assert part["first"].bit_count() == 1
        assert part["last"] == min(2 * part["first"], window) - 1


@pytest.mark.parametrize(("window", "stride", "bos"), SHAPES)
def test_windows_hold_bos_and_predict_every_token_once(text, window: int, stride: int | None, bos: int | None) -> None:
    windows = cut_windows(text, window, stride=stride, bos=bos)
    expected = hand_built(text, window, stride, bos)
    assert windows.tokens(0, windows.count).tolist() == [tokens for tokens, _ in expected]
    predicted = [windows.tokens(i, i + 1)[0, 1 + windows.skipped(i) :].tolist() for i in range(windows.count)]
    assert [len(tokens) for tokens in predicted] == [counted for _, counted in expected]
    if bos is not None or windows.overlapping:  # without either, the first token of a window is not predicted
        flat = [token for tokens in predicted for token in tokens]
        assert flat == text[int(bos is None) :][: len(flat)].tolist()
    if bos is not None and stride is None:
        assert len(flat) > len(text) - window


def test_a_text_that_begins_with_bos_does_not_begin_with_two(models, text) -> None:
    with_bos = torch.cat([tensor([BOS]), text])
    results = [evaluate(models[0], tokens, window=24, bos=BOS) for tokens in (text, with_bos)]
    assert results[0].nll == results[1].nll
    assert cut_windows(with_bos[:2], 24, bos=BOS).tokens(0, 1).tolist() == [[BOS, text[0]]]
    with pytest.raises(TransmlaError, match="at least 2 tokens"):
        cut_windows(with_bos[:1], 24, bos=BOS)


@pytest.mark.parametrize(("window", "stride", "bos"), SHAPES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_more_tokens_are_read_than_the_windows_need(text, window, stride, bos, count: int) -> None:
    tokens = torch.cat([tensor([] if bos is None else [bos], dtype=torch.int64), text, text])
    limit = tokens_needed(window, stride, count, bos)
    whole = cut_windows(tokens, window, stride=stride, max_windows=count, bos=bos)
    cut = cut_windows(tokens[:limit], window, stride=stride, bos=bos)
    assert cut.count == whole.count == count
    assert torch.equal(cut.tokens(0, count), whole.tokens(0, count))
    if count > 1:
        assert cut_windows(tokens[: limit - 1], window, stride=stride, bos=bos).count == count - 1
    assert tokens_needed(window, stride, None, bos) is None


def test_a_single_window_has_no_standard_error(models, text) -> None:
    found = evaluate(models[0], text, window=40, max_windows=1, baseline=models[1]).to_dict()
    assert [found[f"{name}_stderr"] for name in (*MEANS, "perplexity", "baseline_perplexity")] == [None] * 7
    assert all(part["kl_stderr"] is None for part in found["positions"])


def test_the_standard_error_is_the_spread_of_repeated_samples() -> None:
    """Draw windows of two sizes many times: the spread of the means is the mean of the standard errors."""
    generator = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(2000):
        counts = generator.choice([20, 60], 30)
        sums = counts * (3 + generator.standard_normal(30))
        means.append(sums.sum() / counts.sum())
        errors.append(standard_error(tensor(sums), tensor(counts)))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)


def test_the_bins_are_powers_of_two() -> None:
    scores = Scores(windows=2, size=2048)
    scores.add(0, 1, torch.ones(2, 2047, 1))
    assert [(part.first, part.last, part.tokens) for part in scores.positions(compared=False)] == [
        (2**b, 2 ** (b + 1) - 1, 2 * 2**b) for b in range(11)
    ]


def test_the_mean_gives_every_text_equal_weight() -> None:
    first = flat_means({"nll": 2.0, "kl": 0.1}, {"nll": 0.3, "kl": 0.03})
    second = flat_means({"nll": 3.0, "kl": 0.3}, {"nll": 0.4, "kl": 0.04})
    mean = mean_over_texts([first, second])
    assert mean["kl"] == pytest.approx(0.2)
    assert mean["kl_stderr"] == pytest.approx(0.025)
    assert mean["perplexity"] == pytest.approx(math.sqrt(first["perplexity"] * second["perplexity"]))
    assert mean["perplexity_stderr"] == pytest.approx(mean["perplexity"] * 0.25)
    assert mean["top1_agreement"] is None
    assert mean_over_texts([first]) == pytest.approx(first)
    unknown = flat_means({"nll": 3.0, "kl": 0.3}, {"nll": None, "kl": None})
    assert mean_over_texts([first, unknown])["nll_stderr"] is None
