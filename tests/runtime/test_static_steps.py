"""Steps over static caches come from graphs, and write what eager steps write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour import relative
from helpers.graph_models import LONG, MODELS, TOKENS, Repeating, longer, plain_model, prompts, with_graphs, written
from torch import Tensor
from transformers import StaticCache

from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.decode_graphs import DecodeGraphs
from transmla.runtime.graphed_model import graphs_of, use_graphs

ROOM = 64


@pytest.mark.parametrize("family", MODELS)
def test_a_cache_that_is_used_again_keeps_its_graph(family: str, tmp_path: Path) -> None:
    model, inputs = plain_model(family, tmp_path), prompts("cpu", padded=5)
    expected = written(model, inputs, disable_compile=True)
    graphs = with_graphs(model)
    cache: Any = StaticCache(config=model.config, max_cache_len=ROOM)
    for replays in (TOKENS - 2, TOKENS - 1):
        before = graphs.replays
        assert torch.equal(written(model, inputs, disable_compile=True, **{CACHE_ARGUMENT: cache}), expected)
        assert graphs.replays - before == replays
        cache.reset()
    assert graphs.captures == 1


def steps(model: Any, widths: list[int], inference: Callable[[int], bool] = lambda at: False) -> tuple[Tensor, Any]:
    """Return the logits of a prompt and of steps with ``widths`` tokens over a static cache, and the cache.

    ``inference`` says of a number of cached tokens whether the step behind them runs in inference mode.
    """
    cache: Any = StaticCache(config=model.config, max_cache_len=ROOM)
    tokens, at, parts = longer(model, LONG + sum(widths)), 0, []
    for width in (LONG, *widths):
        with torch.inference_mode() if at and inference(at) else torch.no_grad():
            piece = torch.arange(at, at + width)
            mask = (torch.arange(ROOM) <= piece[:, None])[None, None].expand(2, 1, -1, -1)
            given = {"attention_mask": mask, "position_ids": piece[None]}
            parts.append(model(tokens[:, piece], use_cache=True, **{CACHE_ARGUMENT: cache}, **given).logits.clone())
            at += width
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("family", MODELS)
def test_several_new_tokens(family: str, tmp_path: Path) -> None:
    model, widths = plain_model(family, tmp_path), [2, 1, 2, 5, 1, 2, 1]
    expected, before = steps(model, widths)
    graphs = with_graphs(model)
    logits, cache = steps(model, widths)
    assert relative(logits, expected) < 1e-5
    assert (graphs.captures, graphs.replays, graphs.reason) == (2, 4, None)
    for ours, theirs in zip(cache.layers, before.layers, strict=True):
        assert int(ours.cumulative_length) == int(theirs.cumulative_length) == LONG + sum(widths)
        assert relative(ours.keys, theirs.keys) < 1e-5


def test_inference_mode_may_be_entered_and_left(tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    expected, _ = steps(model, [1] * 9)
    graphs = with_graphs(model)
    logits, _ = steps(model, [1] * 9, inference=lambda at: at % 2 == 0)
    assert relative(logits, expected) < 1e-5
    assert (graphs.captures, graphs.replays, graphs.reason) == (2, 7, None)


def test_a_changed_model_is_noticed(tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    graphs = with_graphs(model)
    first, _ = steps(model, [1, 1, 1, 1])
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    assert relative(steps(model, [1, 1, 1, 1])[0], -first) < 1e-6
    assert graphs.captures == 2


class Waiting(Repeating):
    """Recorder whose rehearsals find an operation that waits."""

    def rehearse(self, function: Callable[[], None]) -> None:
        function()
        raise RuntimeError("an operation waits for the GPU")


def test_a_failed_rehearsal_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    expected, _ = steps(model, [1, 1, 1])
    use_graphs(model, DecodeGraphs(Waiting()))
    logits, cache = steps(model, [1, 1, 1])
    graphs = graphs_of(model)
    assert graphs is not None
    assert (graphs.replays, graphs.reason) == (0, "the step cannot be captured: an operation waits for the GPU")
    assert torch.equal(logits, expected)
    assert int(cache.layers[0].cumulative_length) == LONG + 3


def test_models_that_return_more_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model("llama", tmp_path)
    expected, _ = steps(model, [1, 1, 1])
    graphs = with_graphs(model)
    plain: Any = type(model).__mro__[2]
    inner = plain.forward

    def more(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(self, *args, **kwargs)
        output["hidden_states"] = (output.logits,)
        return output

    monkeypatch.setattr(plain, "forward", more)
    assert torch.equal(steps(model, [1, 1, 1])[0], expected)
    assert graphs.replays == 0
