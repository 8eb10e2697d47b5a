"""A shared prefix changes where a prompt is cached, but not the tokens that are generated after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.mla_models import FAMILIES, tiny
from torch import Tensor
from transformers import DynamicCache

import transmla
from transmla.errors import TransmlaError
from transmla.runtime import absorbed, forms
from transmla.runtime.prefix_cache import attend, merge, share

# Tokens of the prefix, and of each continuation.
SHARED, OWN = 11, 4


@pytest.fixture(params=["expanded", "absorbed"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force either form of attention to the prefix, whichever is faster."""
    monkeypatch.setattr(forms, "PRODUCTS_PER_VALUE", float("-inf") if request.param == "expanded" else float("inf"))
    return str(request.param)


def texts(batch: int = 3) -> Tensor:
    """Return tokens [batch, SHARED + OWN] whose first SHARED columns are equal in all rows."""
    generator = torch.Generator().manual_seed(2)
    shared = torch.randint(2, 96, (1, SHARED), generator=generator).expand(batch, -1)
    return torch.cat([shared, torch.randint(2, 96, (batch, OWN), generator=generator)], 1)


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=["greedy", "beams", "many"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens(family: str, settings: dict[str, Any], form: str) -> None:
    model = tiny(family)
    tokens = texts()
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, **settings}
    torch.manual_seed(4)
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    transmla.accelerate(model)
    cache = transmla.shared_prefix(model, tokens[:1, :SHARED])
    torch.manual_seed(4)
    actual = model.generate(tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, **settings)
    assert torch.equal(actual, expected)
    assert all((layer.expanded is not None) == (form == "expanded") for layer in cache.layers)


def test_continuations_of_several_lengths(form: str) -> None:
    """Shorter continuations are padded between prompt and continuation."""
    model = transmla.accelerate(tiny())
    tokens, mask = texts(), torch.ones(3, SHARED + OWN, dtype=torch.int64)
    mask[1, SHARED : SHARED + 2], mask[2, SHARED : SHARED + 3] = 0, 0
    cache = transmla.shared_prefix(model, tokens[:1, :SHARED])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    actual = model.generate(tokens, attention_mask=mask, past_key_values=cache, **settings)[:, SHARED + OWN :]
    for row, real in zip(range(3), mask.bool(), strict=True):
        alone = tokens[row][real][None]
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **settings)[:, alone.shape[1] :]
        assert torch.equal(actual[row : row + 1], expected)


def test_a_mask_that_hides_a_part_of_the_prefix_is_refused() -> None:
    model, tokens = transmla.accelerate(tiny()), texts()
    cache = transmla.shared_prefix(model, tokens[:1, :SHARED])
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    with pytest.raises(ValueError, match="hides a part of the shared prefix"):
        model.generate(tokens, attention_mask=mask, past_key_values=cache, max_new_tokens=2)


def test_adapters_on_kv_b_proj_are_applied(form: str) -> None:
    """The weight of ``kv_b_proj`` does not contain the adapter, so only its ``forward`` is right."""
    model, tokens = tiny(), texts()
    for module in model.modules():
        if hasattr(module, "kv_b_proj"):
            module.kv_b_proj = torch.nn.Sequential(module.kv_b_proj, Louder())
            module.kv_b_proj.weight = module.kv_b_proj[0].weight
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **settings)
    transmla.accelerate(model)
    cache = transmla.shared_prefix(model, tokens[:1, :SHARED])
    assert torch.equal(model.generate(tokens, past_key_values=cache, **settings), expected)


class Louder(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * x


def test_a_long_continuation_is_decoded_in_pieces(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absorbed, "PIECE", 3)
    test_generate_gives_the_same_tokens("deepseek_v3", {}, form)


def test_the_prefix_is_cached_once_and_a_copy_can_be_reused() -> None:
    model = transmla.accelerate(tiny())
    cache = transmla.shared_prefix(model, texts()[:1, :SHARED])
    duplicate = copy.deepcopy(cache)
    tokens = texts(5)
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False}
    first = model.generate(tokens, past_key_values=cache, **settings)
    assert torch.equal(model.generate(tokens, past_key_values=duplicate, **settings), first)
    for layer in cache.layers:
        assert layer.prefix[0].shape == (1, 1, SHARED, 16)
        assert layer.keys.shape[:3] == (5, 1, OWN + 3)
        assert layer.get_seq_length() == SHARED + OWN + 3


def test_merging_two_parts_is_attention_to_both() -> None:
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (5, 9, 9))
    (left, left_lse), (right, right_lse) = (attend(q, k[:, :, s], v[:, :, s], 0.3) for s in (slice(4), slice(4, 9)))
    whole, _ = attend(q, k, v, 0.3)
    assert torch.allclose(merge(left, left_lse, right, right_lse), whole, atol=1e-12)
    assert torch.allclose(whole, (q @ k.mT * 0.3).softmax(-1) @ v, atol=1e-12)


def test_invalid_prefixes_are_refused() -> None:
    model = tiny()
    tokens = texts()
    with pytest.raises(TransmlaError, match="not accelerated"):
        transmla.shared_prefix(model, tokens[:1])
    transmla.accelerate(model)
    with pytest.raises(TransmlaError, match="one prompt"):
        transmla.shared_prefix(model, tokens)
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="one sequence"):
        share(cache)
    model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="one sequence"):
        share(cache)
