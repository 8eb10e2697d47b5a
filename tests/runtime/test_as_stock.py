"""What users do with loaded models: inference mode, attention weights, autocast, dropout, half precision."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour import CACHES, logits_by_step, relative, stock_model, tokens
from torch import Tensor

import transmla
from transmla.errors import TransmlaError
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.load import mla_layers

ROUNDING = 2e-5


@pytest.fixture(scope="module", params=["deepseek_v3", "gemma2"])
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = stock_model(request.param, tmp_path_factory.mktemp(request.param))
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def model(stock: Any) -> Any:
    """The accelerated twin of ``stock``."""
    return transmla.accelerate(copy.deepcopy(stock))


def test_a_cache_of_inference_mode_is_used_outside_of_it(stock: Any, model: Any) -> None:
    ids, logits = tokens(), []
    for one in (stock, model):
        cache = CACHES["dynamic"](one.config)
        with torch.inference_mode():
            one(ids[:, :8], **{CACHE_ARGUMENT: cache})
        with torch.no_grad():
            parts = [one(ids[:, 8:9], **{CACHE_ARGUMENT: cache}).logits]
        parts.append(one(ids[:, 9:10], **{CACHE_ARGUMENT: cache}).logits)
        with torch.inference_mode():
            parts.append(one(ids[:, 10:12], **{CACHE_ARGUMENT: cache}).logits.clone())
        with torch.no_grad():
            parts.append(one(ids[:, 12:13], **{CACHE_ARGUMENT: cache}).logits)
        logits.append(torch.cat([part.detach() for part in parts], 1))
    assert relative(logits[1], logits[0]) < ROUNDING


def attentions(model: Any) -> list[tuple[Tensor, ...]]:
    """Return the attention weights of a prompt, one token and three tokens."""
    ids, cache = tokens(), CACHES["dynamic"](model.config)
    steps = ((0, 5), (5, 6), (6, 9))
    with torch.no_grad():
        return [model(ids[:, a:b], output_attentions=True, **{CACHE_ARGUMENT: cache}).attentions for a, b in steps]


def test_attention_weights_are_missing_with_one_warning_and_given_under_eager(stock: Any, model: Any) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert [len(weights) for weights in attentions(model)] == [0, 0, 0]
    assert [str(w.message) for w in seen if "output_attentions" in str(w.message)] == [
        "latent_attention computes no attention weights, so output_attentions returns none; call "
        "model.set_attn_implementation('eager') to get them"
    ]
    model.set_attn_implementation("eager")
    for ours, theirs in zip(attentions(model), attentions(stock), strict=True):
        assert len(ours) == model.config.num_hidden_layers
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_a_model_loaded_with_another_attention_computes_as_transformers(stock: Any, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path)
    model = transmla.load(tmp_path, attn_implementation="eager")
    assert len(attentions(model)[1]) == model.config.num_hidden_layers
    model.set_attn_implementation("latent_attention")
    with pytest.warns(UserWarning, match="computes no attention weights"):
        assert attentions(model)[1] == ()
    with pytest.warns(UserWarning, match="computes no attention weights"):
        transmla.load(tmp_path, output_attentions=True)


def test_autocast_computes_as_transformers(stock: Any, model: Any) -> None:
    """Queries, rows and weights then have different dtypes."""
    twin = copy.deepcopy(stock)
    if twin.config.model_type == "deepseek_v3":  # transformers 5.17 ignores the soft-cap of Gemma 2 under SDPA
        twin.set_attn_implementation("sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = (logits_by_step(one, CACHES["dynamic"](one.config), "none") for one in (model, twin))
    assert relative(actual, expected) < 3e-2
    assert relative(logits_by_step(stock, CACHES["dynamic"](stock.config), "none"), expected) > 1e-3


def test_dropout_without_gradients_is_applied(model: Any) -> None:
    ids, cache = tokens(), CACHES["dynamic"](model.config)
    for layer in mla_layers(model.train()):
        layer.attention_dropout = 0.5
    with torch.no_grad():
        model(ids[:, :8], **{CACHE_ARGUMENT: cache})
        first, second = (model(ids[:, 8:9], **{CACHE_ARGUMENT: copy.deepcopy(cache)}).logits for _ in range(2))
    assert relative(first, second) > 1e-3


def identity_norms(model: Any) -> Any:
    """Give a DeepSeek model identity norms, as conversions to the native format do."""
    with torch.no_grad():
        for layer in mla_layers(model):
            layer.kv_a_proj_with_mqa.weight[: layer.kv_lora_rank] *= 2.0**-22
            layer.kv_a_layernorm.weight.fill_(2.0**10)
    return model


def test_float16_is_refused_for_identity_norms(tmp_path: Path) -> None:
    model = identity_norms(stock_model("deepseek_v3", tmp_path))
    model.save_pretrained(tmp_path)
    with pytest.raises(TransmlaError, match=r"underflows in float16.*bfloat16"):
        transmla.load(tmp_path, dtype=torch.float16)
    with pytest.raises(TransmlaError, match="layer 0 underflows in float16"):
        transmla.accelerate(copy.deepcopy(model).half())
    assert transmla.load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    transmla.accelerate(model)
    with torch.no_grad(), torch.autocast("cpu", torch.float16), pytest.raises(TransmlaError, match="under autocast"):
        model(tokens(), **{CACHE_ARGUMENT: CACHES["dynamic"](model.config)})
    with torch.no_grad(), pytest.raises(TransmlaError, match="underflows in float16"):
        model.half()(tokens()[:, :1], **{CACHE_ARGUMENT: CACHES["dynamic"](model.config)})


def test_float8_rows_change_between_training_and_decoding() -> None:
    from helpers.mla_models import tiny

    model = transmla.accelerate(tiny(num_hidden_layers=3), cache_dtype="float8_e4m3fn")
    exact, ids = transmla.accelerate(tiny(num_hidden_layers=3)), tokens()
    cache, expected = CACHES["dynamic"](model.config), exact(ids[:, 8:9], **{CACHE_ARGUMENT: filled(exact, ids)}).logits
    model(ids[:, :4], **{CACHE_ARGUMENT: cache})  # with gradients: latents stay as they are
    with torch.no_grad():
        model(ids[:, 4:6], **{CACHE_ARGUMENT: cache})
    assert {layer.keys.dtype for layer in cache.layers} == {torch.uint8}
    model(ids[:, 6:8], **{CACHE_ARGUMENT: cache})
    with torch.no_grad():
        actual = model(ids[:, 8:9], **{CACHE_ARGUMENT: cache}).logits
        cache.crop(-1)
        model.set_attn_implementation("eager")
        assert relative(model(ids[:, 8:9], **{CACHE_ARGUMENT: cache}).logits, actual) < ROUNDING
    assert relative(actual, expected) < 0.2


def filled(model: Any, ids: Tensor) -> Any:
    """Return a cache of the first eight tokens."""
    cache = CACHES["dynamic"](model.config)
    with torch.no_grad():
        model(ids[:, :8], **{CACHE_ARGUMENT: cache})
    return cache
