"""``LatentLayer`` behaves as transformers' ``DynamicLayer`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.mla_models import tiny
from transformers import StaticCache
from transformers.cache_utils import DynamicLayer

import transmla
from transmla.runtime.latent_cache import STEP, LatentLayer, grow_in_place


def grown(length: int, layer: Any) -> Any:
    """Append ``length`` random rows to ``layer``, at most 7 at a time."""
    generator = torch.Generator().manual_seed(length)
    for start in range(0, length, 7):
        n = min(7, length - start)
        layer.update(torch.randn(3, 1, n, 4, generator=generator), torch.randn(3, 1, n, 2, generator=generator))
    return layer


CHANGES: dict[str, Callable[[Any], Any]] = {
    "crop": lambda layer: layer.crop(-5),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([2, 1])),
    "offload": lambda layer: (layer.offload(), layer.prefetch()),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("length", [8, STEP + 9])
def test_a_latent_layer_behaves_as_a_dynamic_layer(length: int, change: str) -> None:
    ours, theirs = grown(length, LatentLayer()), grown(length, DynamicLayer())
    for layer in (ours, theirs):
        CHANGES[change](layer)
    if change == "reset":
        # The layers of transformers 5.17 keep their length.
        theirs = DynamicLayer()
    assert ours.get_seq_length() == theirs.get_seq_length()
    batch = 3 if change == "reset" else theirs.keys.shape[0]
    more = torch.randn(batch, 1, 2, 4), torch.randn(batch, 1, 2, 2)
    for _ in range(2):
        for left, right in zip(ours.update(*more), theirs.update(*more), strict=True):
            assert torch.equal(left, right)


def test_an_offloaded_layer_releases_its_buffer() -> None:
    layer = LatentLayer()
    layer.update(torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 4))
    layer.offload()
    assert layer.rows is None


def test_other_caches_do_not_change() -> None:
    model = transmla.accelerate(tiny())
    cache = StaticCache(config=model.config, max_cache_len=32)
    kinds = [type(layer) for layer in cache.layers]
    grow_in_place(cache, 0)
    grow_in_place(None, 0)
    assert [type(layer) for layer in cache.layers] == kinds
