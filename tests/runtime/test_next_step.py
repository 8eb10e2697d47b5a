"""A step that follows a replayed one: what the host does before and after the replay, and what it notices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour import relative
from helpers.graph_models import LONG, MODELS, TOKENS, Repeating, longer, plain_model, prompts, with_graphs, written
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.decode_graphs import DecodeGraphs
from transmla.runtime.graphed_model import graphs_of, use_graphs

# Operations in which the host waits for a GPU.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_to_cpu")

# Operations that only make another view of their argument.
VIEWS = ("alias", "slice", "expand", "view", "unsqueeze", "select")


class Silent(Repeating):
    """Recorder whose replays do nothing, so that only the operations around them are seen."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        return lambda: None


class Operations(TorchDispatchMode):
    """Names of operations and the largest size of their results, in one list for each step from a graph."""

    def __init__(self, graphs: DecodeGraphs) -> None:
        super().__init__()
        self.steps: list[list[tuple[str, int]]] = []
        self.outside: list[str] = []
        self._inside, self._forward = False, graphs.forward

    def forward(self, *args: Any) -> Any:
        self._inside = True
        self.steps.append([])
        try:
            return self._forward(*args)
        finally:
            self._inside = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not self._inside:
            self.outside.append(name)
            return result
        results = result if isinstance(result, (list, tuple)) else [result]
        self.steps[-1].append((name, max((r.numel() for r in results if isinstance(r, Tensor)), default=0)))
        return result


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("inference", [False, True])
def test_a_replay_waits_for_nothing(
    family: str, padded: int, inference: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, long = plain_model(family, tmp_path), 300
    use_graphs(model, DecodeGraphs(Silent()))
    graphs = graphs_of(model)
    assert graphs is not None
    inputs = {name: t.repeat(1, long // LONG) for name, t in prompts("cpu").items()}
    inputs["attention_mask"][0, :padded] = 0
    operations = Operations(graphs)
    monkeypatch.setattr(graphs, "forward", operations.forward)
    with torch.inference_mode() if inference else nullcontext(), operations:
        written(model, inputs)
    # The prompt, the rehearsal and the capture are not steps that follow a replay.
    assert (len(operations.steps), graphs.replays) == (TOKENS, TOKENS - 2)
    for step in operations.steps[3:]:
        names = [name for name, _ in step]
        assert not {*names} & {*WAITS, "all", "any", "item", "cat"}
        # Tokens, positions and length are written, and the logits are copied.
        assert [name for name in names if name not in VIEWS] == ["fill_", "copy_", "copy_", "clone"]
        assert max(size for _, size in step) <= 2 * model.config.vocab_size < 2 * long
    # generate() asks once a token whether all texts have ended.
    waits = sum(name in WAITS for name in operations.outside)
    assert TOKENS <= waits <= TOKENS + 5


def test_the_second_generate_of_a_shape_is_captured_at_once(tmp_path: Path) -> None:
    model, inputs = plain_model("llama", tmp_path), prompts("cpu", padded=3)
    expected = written(model, inputs)
    graphs = with_graphs(model)
    counts = []
    for _ in range(2):
        before = graphs.replays
        assert torch.equal(written(model, inputs), expected)
        counts.append(graphs.replays - before)
    # One step reads the prompt; the first time, one is a rehearsal.
    assert counts == [TOKENS - 2, TOKENS - 1]


def test_rows_that_another_model_class_cached_are_extended(tmp_path: Path) -> None:
    """The layers of such a cache are transformers' own."""
    model = plain_model("llama", tmp_path)
    tokens = longer(model, LONG + 4)
    found = []
    for graphed in (False, True):
        graphs = with_graphs(model) if graphed else None
        read: Any = DynamicCache(config=model.config)
        cache: Any = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens[:, :LONG], use_cache=True, **{CACHE_ARGUMENT: read})
            for i, layer in enumerate(read.layers):
                cache.update(layer.keys.clone(), layer.values.clone(), i)
            parts = [
                model(tokens[:, i : i + 1], use_cache=True, **{CACHE_ARGUMENT: cache}).logits
                for i in range(LONG, LONG + 4)
            ]
        found.append(torch.cat(parts, 1))
    assert relative(found[1], found[0]) < 1e-5
    assert graphs is not None
    assert (graphs.captures, graphs.replays, graphs.reason) == (1, 3, None)


def gradients(model: Any) -> Any:
    return torch.enable_grad()


def training(model: Any) -> Any:
    model.train()
    return nullcontext()


def hooked(model: Any) -> Any:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: -output)
    return nullcontext()


def asked(model: Any) -> Any:
    model.config.output_hidden_states = True
    return nullcontext()


CHANGES: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "gradients": (gradients, "gradients are enabled"),
    "training": (training, "the model is in training mode"),
    "hook": (hooked, "the model has changed since the last step"),
    "config": (asked, "the model has changed since the last step"),
    "inference mode": (lambda model: torch.inference_mode(), "the rows of the cache cannot be extended in place"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_a_replayed_step(change: str, tmp_path: Path) -> None:
    apply, reason = CHANGES[change]
    found = []
    for graphed in (False, True):
        model = plain_model("llama", tmp_path / str(graphed))
        tokens = longer(model, LONG + 5)
        graphs = with_graphs(model) if graphed else None
        cache: Any = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens[:, :LONG], use_cache=True, **{CACHE_ARGUMENT: cache})
            for i in range(LONG, LONG + 4):
                model(tokens[:, i : i + 1], use_cache=True, **{CACHE_ARGUMENT: cache})
            with apply(model):
                output = model(tokens[:, LONG + 4 :], use_cache=True, **{CACHE_ARGUMENT: cache}).logits
        found.append(output)
    assert relative(found[1].detach(), found[0].detach()) < 1e-5
    assert found[1].requires_grad == found[0].requires_grad
    assert graphs is not None
    assert graphs.reason == reason
    assert cache.get_seq_length() == LONG + 5


@pytest.mark.parametrize("what", ["cropped", "selected", "replaced layer", "other batch"])
def test_a_cache_that_was_changed_between_two_steps(what: str, tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    tokens, found = longer(model, LONG + 9), []

    def alter(cache: Any) -> None:
        if what == "cropped":
            cache.crop(-2)
        elif what == "selected":
            cache.batch_select_indices(torch.tensor([1, 0]))
        elif what == "other batch":
            cache.batch_repeat_interleave(2)
        else:
            fresh: Any = DynamicCache(config=model.config)
            for i, layer in enumerate(cache.layers):
                fresh.update(-layer.keys, layer.values.clone(), i)
            cache.layers[1:3] = fresh.layers[1:3]

    for graphed in (False, True):
        graphs = with_graphs(model) if graphed else None
        cache: Any = DynamicCache(config=model.config)
        parts = []
        with torch.no_grad():
            model(tokens[:, :LONG], use_cache=True, **{CACHE_ARGUMENT: cache})
            for i in range(LONG, LONG + 8):
                if i == LONG + 4:
                    alter(cache)
                given = tokens[:, i : i + 1].repeat_interleave(cache.layers[0].keys.shape[0] // 2, 0)
                parts.append(model(given, use_cache=True, **{CACHE_ARGUMENT: cache}).logits[:2])
        found.append(torch.cat(parts, 1))
    assert relative(found[1], found[0]) < 1e-5
    assert graphs is not None
    assert graphs.replays >= 5
