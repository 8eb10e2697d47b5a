"""``evaluate`` equals cross-entropy and KL divergence computed from full logits by their definitions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from transmla.errors import TransmlaError
from transmla.evaluate import perplexity_and_kl as module
from transmla.evaluate.perplexity_and_kl import Evaluation, evaluate

VOCABULARY = 50


def tiny(seed: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
        )
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny(0)


@pytest.fixture(scope="module")
def baseline(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return the model with perturbed weights, so similar that the most likely tokens often agree."""
    other = tiny(0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for weight in other.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return other


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (200,), generator=torch.Generator().manual_seed(2))


def brute_force(model, baseline, tokens, window: int, stride: int) -> dict[str, float]:
    """Compute the result from the full float64 logits of one window at a time."""
    model_nll, baseline_nll, kl, agreed = [], [], [], []
    for start in range(0, len(tokens) - window + 1, stride):
        ids = tokens[start : start + window]
        with torch.no_grad():
            p = model(ids[None]).logits[0, :-1].double()
            q = baseline(ids[None]).logits[0, :-1].double()
        counted = slice(-stride, None) if start and stride < window else slice(None)
        model_nll.append(cross_entropy(p, ids[1:], reduction="none")[counted])
        baseline_nll.append(cross_entropy(q, ids[1:], reduction="none")[counted])
        divergence = q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))
        kl.append(divergence.sum(-1)[counted])
        agreed.append((p.argmax(-1) == q.argmax(-1))[counted].double())
    nll = torch.cat(model_nll)
    return {
        "perplexity": nll.mean().exp().item(),
        "nll": nll.mean().item(),
        "tokens": len(nll),
        "windows": len(model_nll),
        "baseline_perplexity": torch.cat(baseline_nll).mean().exp().item(),
        "kl": torch.cat(kl).mean().item(),
        "top1_agreement": torch.cat(agreed).mean().item(),
    }


def assert_matches(result: Evaluation, expected: dict[str, float]) -> None:
    values = {key: result.to_dict()[key] for key in expected}
    assert values == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("chunk", [7, 256])
@pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 8), (33, 32), (32, 31), (17, 1), (2, 2)])
def test_evaluate_equals_the_brute_force_result(
    window: int, stride: int, chunk: int, batch_size: int, model, baseline, tokens, monkeypatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    result = evaluate(model, tokens, window=window, stride=stride, baseline=baseline, batch_size=batch_size)
    expected = brute_force(model, baseline, tokens, window, stride)
    assert_matches(result, expected)
    assert 0.1 < expected["top1_agreement"] < 1
    assert (result.window, result.stride) == (window, stride)


def test_a_model_agrees_with_itself(model, tokens) -> None:
    result = evaluate(model, tokens, window=32, baseline=model)
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1
    assert result.baseline_perplexity == result.perplexity


def test_without_a_baseline_there_is_no_comparison(model, tokens) -> None:
    result = evaluate(model, tokens, window=32)
    assert (result.baseline_perplexity, result.kl, result.top1_agreement) == (None, None, None)
    assert result.stride == 32
    assert json.loads(json.dumps(result.to_dict()))["perplexity"] == result.perplexity


def test_max_windows_and_progress(model, tokens) -> None:
    done: list[tuple[int, int]] = []
    result = evaluate(
        model, tokens, window=20, stride=10, max_windows=6, batch_size=3, progress=lambda *p: done.append(p)
    )
    assert done == [(1, 6), (4, 6), (6, 6)]
    assert (result.windows, result.tokens) == (6, 19 + 5 * 10)
    assert result.nll == evaluate(model, tokens[:70], window=20, stride=10, batch_size=3).nll


def test_a_short_text_is_one_window(model, baseline, tokens) -> None:
    result = evaluate(model, tokens[:9], window=2048, baseline=baseline)
    assert_matches(result, brute_force(model, baseline, tokens[:9], 9, 9))
    assert (result.window, result.stride, result.tokens) == (9, 9, 8)


def test_logits_of_half_precision_models_are_scored_in_float32(model, tokens) -> None:
    half = tiny(0).bfloat16()
    with torch.no_grad():
        logits = half(tokens[None, :64]).logits[0, :-1].double()
    expected = cross_entropy(logits, tokens[1:64]).item()
    result = evaluate(half, tokens[:64], baseline=model)
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.kl is not None
    assert 0 < result.kl < 0.1


def test_training_modes_and_gradients_are_restored(tokens) -> None:
    trained, mixed = tiny(0).train(), tiny(1).train()
    mixed.model.layers[0].eval()
    flags = [part.training for part in mixed.modules()]
    evaluate(trained, tokens, window=32, baseline=mixed)
    assert all(part.training for part in trained.modules())
    assert [part.training for part in mixed.modules()] == flags
    assert all(weight.requires_grad for weight in trained.parameters())
    assert torch.is_grad_enabled()


def test_a_broken_model_has_infinite_perplexity(tokens) -> None:
    broken = tiny(0)
    with torch.no_grad():
        broken.lm_head.weight.mul_(1e4)
    assert evaluate(broken, tokens, window=32).perplexity == math.inf


def test_a_window_above_the_context_is_refused_unless_the_text_is_shorter(model, tokens) -> None:
    short = tiny(1)
    short.config.max_position_embeddings = 64
    message = r"window of 65 tokens is longer than the {}'s context; max_position_embeddings is 64; use a window of at"
    with pytest.raises(TransmlaError, match=message.format("model")):
        evaluate(short, tokens, window=65)
    with pytest.raises(TransmlaError, match=message.format("baseline")):
        evaluate(model, tokens, window=65, baseline=short)
    with pytest.raises(TransmlaError, match="a window of 100000 tokens is longer"):
        evaluate(short, tokens[:70], window=100_000)
    assert evaluate(short, tokens, window=64).window == 64
    assert evaluate(short, tokens[:40], window=65).window == 40


def test_tokens_outside_the_vocabulary_are_refused(model, tokens) -> None:
    foreign = tokens.index_fill(0, torch.tensor([3]), VOCABULARY)
    with pytest.raises(TransmlaError, match="the text holds token 50; the model's vocabulary has 50 entries"):
        evaluate(model, foreign, window=32)


def test_a_stride_above_the_window_is_refused(model, tokens) -> None:
    with pytest.raises(TransmlaError, match="stride 33 is larger than the window; windows of 32 tokens"):
        evaluate(model, tokens, window=32, stride=33)
    assert evaluate(model, tokens[:9], window=32, stride=32).stride == 9


def test_invalid_input_is_refused(model, tokens) -> None:
    with pytest.raises(TransmlaError, match=r"baseline's vocabulary has 60 entries, the model's 50"):
        evaluate(model, tokens, window=32, baseline=tiny(0, 60))
    with pytest.raises(TransmlaError, match="at least 2"):
        evaluate(model, tokens[:1])
    with pytest.raises(TransmlaError, match="at least 2"):
        evaluate(model, tokens[None])
    for bad in ({"window": 1}, {"stride": 0}, {"batch_size": 0}, {"max_windows": 0}):
        with pytest.raises(TransmlaError, match="at least 1"):
            evaluate(model, tokens, **bad)
