"""Threads share a model: what one of them runs meanwhile changes nothing for the others. Nor does what a hook runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour import relative, stock_model
from helpers.graph_models import LONG, longer
from torch import Tensor
from transformers import DynamicCache

import transmla
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.load import mla_layers


def interrupt(model: Any, call: Any, *, same_thread: bool = False) -> None:
    """Let another thread, or the same, run ``call`` once while the second layer of ``model`` projects its rows."""

    def hook(*_: Any) -> None:
        handle.remove()
        if same_thread:
            call()
            return
        with ThreadPoolExecutor(1) as pool:
            pool.submit(call).result()

    handle = mla_layers(model)[1].kv_a_proj_with_mqa.register_forward_hook(hook)


@torch.no_grad()
def read(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Return the logits of ``tokens``, read behind the rows of ``cache``."""
    logits: Tensor = model(tokens, use_cache=True, **{CACHE_ARGUMENT: cache}).logits
    return logits


@pytest.mark.parametrize("same_thread", [False, True])
@pytest.mark.parametrize("cache_dtype", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("kind", ["dynamic", "prefix"])
def test_other_rows_are_read_meanwhile(kind: str, cache_dtype: str | None, same_thread: bool, tmp_path: Path) -> None:
    model = transmla.accelerate(stock_model("llama", tmp_path, keep=()), cache_dtype=cache_dtype)
    tokens = longer(model, LONG)

    def run() -> Tensor:
        cache = transmla.shared_prefix(model, tokens[:1, :7]) if kind == "prefix" else DynamicCache(config=model.config)
        if meanwhile:
            other = DynamicCache(config=model.config)
            interrupt(model, lambda: read(model, tokens[:, 5:9], other), same_thread=same_thread)
        return read(model, tokens, cache)

    meanwhile = False
    expected = run()
    meanwhile = True
    assert relative(run(), expected) < 1e-6


def test_a_prefix_is_made_meanwhile(tmp_path: Path) -> None:
    """The rows of the other thread stay float8, although those of a prefix are not."""
    model = transmla.accelerate(stock_model("llama", tmp_path, keep=()), cache_dtype="float8_e4m3fn")
    tokens = longer(model, LONG)
    alone, meanwhile = DynamicCache(config=model.config), DynamicCache(config=model.config)
    read(model, tokens, alone)
    interrupt(model, lambda: read(model, tokens, meanwhile))
    transmla.shared_prefix(model, tokens[:1, :7])
    for expected, found in zip(alone.layers, meanwhile.layers, strict=True):
        assert torch.equal(found.keys, expected.keys)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_a_copy_made_while_a_thread_reads_holds_nothing_of_it(
    copied: Callable[[Any], Any], family: str, tmp_path: Path
) -> None:
    model, twins = transmla.accelerate(stock_model(family, tmp_path, keep=())), []
    tokens = longer(model, LONG)
    expected = read(model, tokens, DynamicCache(config=model.config))
    interrupt(model, lambda: twins.append(copied(model)))
    assert torch.equal(read(model, tokens, DynamicCache(config=model.config)), expected)
    assert all(layer.running == {} and layer.step is None for twin in twins for layer in mla_layers(twin))
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda one: read(one, tokens, DynamicCache(config=one.config)), [twins[0], model]):
            assert torch.equal(found, expected)
