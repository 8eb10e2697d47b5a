"""A shared prefix changes where a prompt is kept, and nothing that is said after it."""

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
from transmla.runtime import latent_attention as attention
from transmla.runtime import prefix_cache as prefix
from transmla.runtime.prefix_cache import attend, expanding_is_cheaper, merge, share

SHARED, OWN = 11, 4


@pytest.fixture(params=["expanded", "absorbed"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The prefix attended to in either form, whatever would pay."""
    monkeypatch.setattr(prefix, "PRODUCTS_PER_VALUE", float("-inf") if request.param == "expanded" else float("inf"))
    return str(request.param)


def texts(batch: int = 3) -> Tensor:
    """[batch, SHARED + OWN] tokens that begin alike."""
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
    wanted = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    transmla.accelerate(model)
    cache = transmla.shared_prefix(model, tokens[:1, :SHARED])
    torch.manual_seed(4)
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, **settings)
    assert torch.equal(found, wanted)
    assert all((layer.expanded is not None) == (form == "expanded") for layer in cache.layers)


def test_continuations_of_several_lengths(form: str) -> None:
    """Padding stands between the prompt and the shorter continuations."""
    model = transmla.accelerate(tiny())
    tokens, mask = texts(), torch.ones(3, SHARED + OWN, dtype=torch.int64)
    mask[1, SHARED : SHARED + 2], mask[2, SHARED : SHARED + 3] = 0, 0
    cache = transmla.shared_prefix(model, tokens[:1, :SHARED])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = model.generate(tokens, attention_mask=mask, past_key_values=cache, **settings)[:, SHARED + OWN :]
    for row, kept in zip(range(3), mask.bool(), strict=True):
        alone = tokens[row][kept][None]
        wanted = model.generate(alone, attention_mask=torch.ones_like(alone), **settings)[:, alone.shape[1] :]
        assert torch.equal(found[row : row + 1], wanted)


def test_a_mask_that_hides_some_of_the_prefix_is_refused() -> None:
    model, tokens = transmla.accelerate(tiny()), texts()
    cache = transmla.shared_prefix(model, tokens[:1, :SHARED])
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    with pytest.raises(ValueError, match="hides a part of the shared prefix"):
        model.generate(tokens, attention_mask=mask, past_key_values=cache, max_new_tokens=2)


def test_projections_with_a_forward_of_their_own_are_asked(form: str) -> None:
    """An adapter's part of W_UK and W_UV is in neither weight."""
    model, tokens = tiny(), texts()
    for module in model.modules():
        if hasattr(module, "kv_b_proj"):
            module.kv_b_proj = torch.nn.Sequential(module.kv_b_proj, Louder())
            module.kv_b_proj.weight = module.kv_b_proj[0].weight
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    wanted = model.generate(tokens, **settings)
    transmla.accelerate(model)
    cache = transmla.shared_prefix(model, tokens[:1, :SHARED])
    assert torch.equal(model.generate(tokens, past_key_values=cache, **settings), wanted)


class Louder(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * x


def test_a_long_continuation_is_read_in_pieces(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PIECE", 3)
    test_generate_gives_the_same_tokens("deepseek_v3", {}, form)


def test_the_prefix_is_held_once_and_may_be_used_again() -> None:
    model = transmla.accelerate(tiny())
    cache = transmla.shared_prefix(model, texts()[:1, :SHARED])
    kept = copy.deepcopy(cache)
    tokens = texts(5)
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False}
    first = model.generate(tokens, past_key_values=cache, **settings)
    assert torch.equal(model.generate(tokens, past_key_values=kept, **settings), first)
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


def test_few_queries_leave_the_prefix_a_latent() -> None:
    class Shape:
        kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim = 512, 128, 64, 128

    assert not expanding_is_cheaper(Shape, 32)
    assert expanding_is_cheaper(Shape, 64)
    Shape.kv_lora_rank = 96  # expanding saves no product
    assert not expanding_is_cheaper(Shape, 10**6)


def test_what_cannot_be_shared_is_refused() -> None:
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
