"""Windows, softcaps and sinks equal the attention of the families that have them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.random_layer import relative
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss

from transmla.artifacts import ScoreRules
from transmla.core.fused_attention import attend
from transmla.core.reference_attention import causal_softmax

HEADS, LENGTH, WINDOW, SCALING = 4, 24, 7, 0.3
SINKS = torch.tensor([2.0, -3.0, 0.0, 5.0], dtype=torch.float64)
CASES = {
    "plain": ScoreRules(),
    "window": ScoreRules(window=WINDOW),
    "softcap": ScoreRules(softcap=1.5),
    "softcap and window": ScoreRules(window=WINDOW, softcap=1.5),
    "sinks": ScoreRules(sinks=SINKS),
    "sinks and window": ScoreRules(window=WINDOW, sinks=SINKS),
}


def family_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: ScoreRules) -> torch.Tensor:
    """Return the attention of gpt-oss if ``rules`` has sinks, otherwise of Gemma 2; [N, H, T, d_v]."""
    mask = torch.full((LENGTH, LENGTH), float("-inf"), dtype=q.dtype).triu(1)
    if rules.window is not None:
        mask = mask + torch.full_like(mask, float("-inf")).tril(-rules.window)
    module: Any = SimpleNamespace(num_key_value_groups=1, training=False, sinks=rules.sinks, head_dim=q.shape[-1])
    if rules.sinks is not None:
        return gpt_oss(module, q, k, v, mask[None, None], scaling=SCALING)[0].transpose(1, 2)
    return gemma2(module, q, k, v, mask[None, None], scaling=SCALING, softcap=rules.softcap)[0].transpose(1, 2)


@pytest.mark.parametrize("rules", CASES.values(), ids=CASES)
def test_attention_equals_the_families(rules: ScoreRules) -> None:
    torch.manual_seed(0)
    q, k = (3 * torch.randn(2, HEADS, LENGTH, 8, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, HEADS, LENGTH, 5, dtype=torch.float64)
    reference = causal_softmax(q @ k.mT * SCALING, rules=rules) @ v
    # The families compute the softmax in float32.
    assert relative(reference, family_attention(q, k, v, rules)) < 1e-6
    assert relative(attend(q, k, v, scaling=SCALING, rules=rules), reference) < 1e-12


@pytest.mark.parametrize("window", [1, 2, 7, 8, 11, 12, 23, 24, 30])
@pytest.mark.parametrize("name", ["window", "softcap and window", "sinks and window"])
def test_windows_of_any_length_give_the_same_values_and_gradients(name: str, window: int) -> None:
    """A text of more than two windows is attended to in blocks; blocks may or may not divide it."""
    torch.manual_seed(2)
    rules = replace(CASES[name], window=window)
    q, k, v = (torch.randn(2, HEADS, LENGTH, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weights = torch.randn(2, HEADS, LENGTH, 6, dtype=torch.float64)
    reference = causal_softmax(q @ k.mT * SCALING, rules=rules) @ v
    blocks = attend(q, k, v, scaling=SCALING, rules=rules)
    assert (blocks - reference).abs().max() < 1e-12
    expected = torch.autograd.grad((reference * weights).sum(), (q, k, v))
    for gradient, exact in zip(torch.autograd.grad((blocks * weights).sum(), (q, k, v)), expected, strict=True):
        assert (gradient - exact).abs().max() < 1e-12


@pytest.mark.parametrize("rules", CASES.values(), ids=CASES)
def test_subset_of_queries_and_heads_equals_the_whole(rules: ScoreRules) -> None:
    torch.manual_seed(1)
    scores, positions = 3 * torch.randn(2, HEADS, LENGTH, LENGTH, dtype=torch.float64), torch.tensor([3, 17, 23])
    whole = causal_softmax(scores, rules=rules)
    part = causal_softmax(scores[:, 1:3, positions], positions, rules.heads(slice(1, 3)))
    assert torch.equal(part, whole[:, 1:3, positions])
