"""Float8 rows in captured steps and in static caches: the tokens and logits of eager steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour import relative
from helpers.graph_models import DEVICES, LONG, MODELS, TOKENS, longer, plain_model, prompts, with_graphs, written
from torch import Tensor
from transformers import DynamicCache, StaticCache

import transmla
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.graphed_model import use_graphs
from transmla.runtime.latent_cache import LatentLayer
from transmla.runtime.packed_static import PackedStaticLayer

FLOAT8 = "float8_e4m3fn"
STATIC = {"cache_implementation": "static", "disable_compile": True}
# Settings of generate(), number of prompts, padded tokens, and the least number of replayed steps.
WAYS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "batch": ({}, 3, 0, TOKENS - 2),
    "left padding": ({}, 3, 5, TOKENS - 2),
    "prompt lookup": ({"prompt_lookup_num_tokens": 4}, 1, 0, 3),
    "beams": ({"num_beams": 3}, 2, 5, TOKENS - 2),
    "static cache": (STATIC, 2, 5, TOKENS - 2),
    "static cache with beams": ({**STATIC, "num_beams": 3}, 2, 5, 0),
}


@pytest.fixture(scope="module", params=[(family, device) for device in DEVICES for family in MODELS], ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of four layers in float32 that caches latents as float8."""
    family, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("captures CUDA graphs")
    plain = plain_model(family, tmp_path_factory.mktemp(family), device)
    return transmla.accelerate(plain, cache_dtype=FLOAT8, cuda_graphs=False)


@pytest.mark.parametrize("way", WAYS)
def test_graphs_write_the_tokens_of_eager_steps(model: Any, way: str) -> None:
    settings, batch, padded, replays = WAYS[way]
    inputs = prompts(model.device, batch, padded)
    use_graphs(model, None)
    expected = written(model, inputs, **settings)
    graphs = with_graphs(model)
    assert torch.equal(written(model, inputs, **settings), expected)
    assert graphs.replays >= replays, graphs.reason


def logits(model: Any, cache: Any, tokens: Tensor, pieces: list[int]) -> Tensor:
    """Return the logits of ``tokens`` behind a prompt of LONG, read in ``pieces``."""
    parts, at = [], LONG
    with torch.no_grad():
        model(tokens[:, :LONG], **{CACHE_ARGUMENT: cache})
        for piece in pieces:
            at += piece
            parts.append(model(tokens[:, at - piece : at], **{CACHE_ARGUMENT: cache}).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("pieces", [[1] * 9, [3, 1, 1, 3, 5, 1], [2] * 5], ids=str)
def test_steps_leave_the_rows_of_eager_steps(model: Any, pieces: list[int]) -> None:
    tokens, caches, found = longer(model, LONG + sum(pieces)), [], []
    for graphs in (False, True):
        if graphs:
            captured = with_graphs(model)
        else:
            use_graphs(model, None)
        caches.append(DynamicCache(config=model.config))
        found.append(logits(model, caches[-1], tokens, pieces))
    assert captured.replays >= len(pieces) - len(set(pieces)), captured.reason
    assert relative(found[1], found[0]) < 1e-4
    layers: list[list[Any]] = [cache.layers for cache in caches]
    for eager, replayed in zip(*layers, strict=True):
        assert isinstance(replayed, LatentLayer)
        assert replayed.keys is not None
        assert replayed.keys.dtype == torch.uint8
        assert replayed.keys.shape == eager.keys.shape


def test_a_full_buffer_grows_in_bytes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prompts(model.device)
    use_graphs(model, None)
    expected = written(model, inputs)
    monkeypatch.setattr("transmla.runtime.latent_cache.STEP", 1)
    monkeypatch.setattr("transmla.runtime.latent_cache.BATCH_STEP", 1)
    monkeypatch.setattr("transmla.runtime.latent_cache.PAGE", 8)
    graphs = with_graphs(model)
    assert torch.equal(written(model, inputs), expected)
    assert graphs.captures > 1
    # One step rehearses each new buffer.
    assert graphs.replays >= TOKENS - 1 - graphs.captures, graphs.reason


def test_static_rows_are_the_rows_of_a_growing_cache(model: Any) -> None:
    use_graphs(model, None)
    pieces = [1, 1, 3, 1]
    tokens = longer(model, LONG + sum(pieces))
    growing = DynamicCache(config=model.config)
    expected = logits(model, growing, tokens, pieces)
    for static in (StaticCache(model.config, 64), StaticCache(model.config, 64)):
        found = logits(model, static, tokens, pieces)
        assert relative(found, expected) < 1e-4
        layers: list[Any] = static.layers
        assert all(isinstance(layer, PackedStaticLayer) for layer in layers)
        rows = LONG + sum(pieces)
        assert layers[0].keys.dtype == torch.uint8
        assert torch.equal(layers[0].keys[:, :, :rows], growing.layers[0].keys)


def test_a_static_cache_with_plain_rows_is_packed(model: Any) -> None:
    use_graphs(model, None)
    tokens, found = longer(model, LONG + 2), []
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, 64)):
        with torch.no_grad():
            transmla.accelerate(model, cuda_graphs=False)
            model(tokens[:, :LONG], **{CACHE_ARGUMENT: cache})
            assert all(layer.keys.dtype == torch.float32 for layer in cache.layers)
            if isinstance(cache, DynamicCache):
                cache = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
            transmla.accelerate(model, cache_dtype=FLOAT8, cuda_graphs=False)
            found.append(model(tokens[:, LONG:], **{CACHE_ARGUMENT: cache}).logits)
        assert all(layer.keys.dtype == torch.uint8 for layer in cache.layers)
    assert relative(found[1], found[0]) < 1e-4


def test_rows_of_both_kinds_are_rehearsed(tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    tokens = longer(model, LONG + 4)
    expected = logits(model, DynamicCache(config=model.config), tokens, [1] * 4)
    plain, packed = DynamicCache(config=model.config), DynamicCache(config=model.config)
    graphs = with_graphs(model)
    assert relative(logits(model, plain, tokens, [1] * 4), expected) < 1e-4
    transmla.accelerate(model, cache_dtype=FLOAT8, cuda_graphs=False)
    use_graphs(model, graphs)
    close = logits(model, packed, tokens, [1] * 4)
    assert 0 < relative(close, expected) < 0.1
    # The first cache keeps its plain rows.
    with torch.no_grad():
        again = model(tokens[:, -1:], **{CACHE_ARGUMENT: plain}).logits
    assert again.isfinite().all()
    assert [layer.keys.dtype for layer in plain.layers] == [torch.float32] * 4
    assert [layer.keys.dtype for layer in packed.layers] == [torch.uint8] * 4


def test_a_step_over_a_static_cache_compiles_to_one_graph(tmp_path: Path) -> None:
    model = transmla.accelerate(plain_model("qwen3", tmp_path), cache_dtype=FLOAT8, cuda_graphs=False)
    tokens, graphs = longer(model, LONG + 3), []
    step = torch.compile(model.forward, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    caches = [StaticCache(model.config, 64) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(tokens[:, :LONG], **{CACHE_ARGUMENT: cache})
        for at in range(LONG, LONG + 3):
            expected = model(tokens[:, at : at + 1], **{CACHE_ARGUMENT: caches[0]}).logits
            found = step(tokens[:, at : at + 1], **{CACHE_ARGUMENT: caches[1]}).logits
            assert relative(found, expected) < 1e-4
    assert len(graphs) == 1
