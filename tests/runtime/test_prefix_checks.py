"""A shared prefix gives what generation without one gives, or is refused by name."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.behaviour import relative
from helpers.mla_models import tiny
from torch import Tensor

import transmla
from transmla.errors import TransmlaError
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.load import mla_layers
from transmla.runtime.prefix_cache import PrefixCache

# Tokens of the prefix.
SHARED = 9
SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def texts(seed: int, rows: int = 2) -> Tensor:
    """Return tokens [rows, SHARED + 3] that begin with the same prompt for every seed."""
    prompt = torch.randint(2, 96, (1, SHARED), generator=torch.Generator().manual_seed(0))
    own = torch.randint(2, 96, (rows, 3), generator=torch.Generator().manual_seed(seed))
    return torch.cat([prompt.expand(rows, -1), own], 1)


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny(num_hidden_layers=3)


@pytest.fixture
def model(stock: Any) -> Any:
    return transmla.accelerate(copy.deepcopy(stock))


@pytest.fixture
def cache(model: Any) -> PrefixCache:
    return transmla.shared_prefix(model, texts(1)[:1, :SHARED])


def generate(model: Any, ids: Tensor, cache: Any = None) -> Tensor:
    given = {} if cache is None else {CACHE_ARGUMENT: cache}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **SETTINGS, **given)


def test_one_prefix_serves_many_calls(stock: Any, model: Any, cache: PrefixCache) -> None:
    """Other continuations, other batch sizes, and rows that an unfinished forward left behind."""
    for seed, rows in ((1, 2), (1, 2), (2, 3), (3, 2)):
        ids = texts(seed, rows)
        assert generate(model, ids, cache).equal(generate(stock, ids))
    with torch.no_grad():
        model(texts(3)[:, SHARED:], **{CACHE_ARGUMENT: cache})
    assert generate(model, texts(4), cache).equal(generate(stock, texts(4)))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_attention_implementations_attend_to_the_prefix(
    stock: Any, model: Any, cache: PrefixCache, implementation: str
) -> None:
    model.set_attn_implementation(implementation)
    assert generate(model, texts(1), cache).equal(generate(stock, texts(1)))


def test_other_tokens_are_refused(model: Any, cache: PrefixCache) -> None:
    ids = texts(1)
    ids[1, 4] = (ids[1, 4] + 1) % 90 + 2
    with pytest.raises(TransmlaError, match="token 4 of row 1 differs from the shared prefix"):
        generate(model, ids, cache)
    with pytest.raises(TransmlaError, match="at least one token behind it"):
        generate(model, texts(1)[:, :SHARED], cache)
    with pytest.raises(TransmlaError, match="without input_ids"):
        model.generate(inputs_embeds=model.get_input_embeddings()(texts(1)), **{CACHE_ARGUMENT: cache}, **SETTINGS)


def scaled(model: Any) -> Any:
    with torch.no_grad():
        mla_layers(model)[-1].kv_b_proj.weight.mul_(1.01)
    return model


def scaled_unseen_by_autograd(model: Any) -> Any:
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1.01)
    return model


@pytest.mark.parametrize("change", [scaled, scaled_unseen_by_autograd, lambda model: model.bfloat16()])
def test_other_weights_are_refused(model: Any, cache: PrefixCache, change: Callable[[Any], Any]) -> None:
    change(model)
    with pytest.raises(TransmlaError, match=r"computes otherwise.*call shared_prefix\(\) again"):
        generate(model, texts(1), cache)
    generate(model, texts(1), transmla.shared_prefix(model, texts(1)[:1, :SHARED]))


def test_copies_of_the_model_check_the_prefix_too(stock: Any, model: Any, cache: PrefixCache) -> None:
    expected = generate(stock, texts(1))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.generate.model() is twin
        assert generate(twin, texts(1), copy.deepcopy(cache)).equal(expected)
        with pytest.raises(TransmlaError, match="computes otherwise"):
            generate(scaled(twin), texts(1), cache)
    assert generate(model, texts(1), pickle.loads(pickle.dumps(cache))).equal(expected)


def test_the_check_does_not_keep_the_model_alive(stock: Any) -> None:
    model = transmla.accelerate(copy.deepcopy(stock))
    transmla.shared_prefix(model, texts(1)[:1, :SHARED])
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_rows_behind_the_prefix_are_cropped_and_the_prefix_is_not(stock: Any, model: Any, cache: PrefixCache) -> None:
    ids = texts(1)
    with torch.no_grad():
        model(ids[:, SHARED:], **{CACHE_ARGUMENT: cache})
        cache.crop(-2)
        logits = model(ids[:, -2:], **{CACHE_ARGUMENT: cache}).logits
        assert relative(logits, stock(ids).logits[:, -2:]) < 2e-5
        with pytest.raises(ValueError, match="3 lie behind the shared prefix"):
            cache.crop(-4)
        cache.reset()
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0]))
        logits = model(ids[:, SHARED:], **{CACHE_ARGUMENT: cache}).logits
        assert relative(logits, stock(ids).logits[:, SHARED:]) < 2e-5


def test_a_prefix_of_another_model_is_refused(stock: Any, cache: PrefixCache) -> None:
    """Models that have made a prefix themselves check every one."""
    other = transmla.accelerate(scaled(copy.deepcopy(stock)))
    transmla.shared_prefix(other, texts(1)[:1, :SHARED])
    with pytest.raises(TransmlaError, match="computes otherwise"):
        generate(other, texts(1), cache)
    for changes in ({"kv_lora_rank": 24}, {"num_hidden_layers": 2}):
        wide = transmla.accelerate(tiny(**{"num_hidden_layers": 3} | changes))
        transmla.shared_prefix(wide, texts(1)[:1, :SHARED])
        with pytest.raises(TransmlaError, match=r"made by another model .*; call shared_prefix\(\) with this model"):
            generate(wide, texts(1), cache)


@pytest.mark.parametrize(
    "given", [[1, 2], "hello", None, {"input_ids": 1}, torch.ones(3), torch.ones(1, 3), torch.ones(1, 1, 3).long()]
)
def test_what_is_no_prompt_is_refused(model: Any, given: Any) -> None:
    with pytest.raises(TransmlaError, match=r"shared_prefix\(\) got input_ids of .*; give input_ids as a tensor"):
        transmla.shared_prefix(model, given)


@pytest.mark.parametrize("given", [[1, 2, 3], torch.ones(12).long()])
def test_tokens_that_are_no_rows_are_refused(model: Any, cache: PrefixCache, given: Any) -> None:
    with pytest.raises(TransmlaError, match=r"generate\(\) got input_ids of .* with a shared prefix"):
        model.generate(given, **{CACHE_ARGUMENT: cache})


def test_a_prefix_needs_a_model_that_generates(stock: Any) -> None:
    headless = transmla.accelerate(copy.deepcopy(stock).model)
    with pytest.raises(TransmlaError, match="cannot generate text"):
        transmla.shared_prefix(headless, texts(1)[:1])
