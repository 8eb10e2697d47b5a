"""Steps from graphs write the tokens of eager steps, in every mode of generate() that graphs support.

On a CPU, a step on fixed memory is repeated instead of replayed. On a GPU, it is captured.
"""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour import relative
from helpers.graph_models import DEVICES, LONG, MODELS, TOKENS, longer, plain_model, prompts, with_graphs, written
from torch import Tensor
from transformers import DynamicCache

from transmla.modeling.transformers_api import CACHE_ARGUMENT, OLD_CACHE_ARGUMENT
from transmla.runtime.decode_graphs import MOST_NEW, DecodeGraphs
from transmla.runtime.graphed_model import GraphedModel, graphs_of, use_graphs


@pytest.fixture(scope="module", params=[(family, device) for device in DEVICES for family in MODELS], ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An accelerated model of four layers in float32, on a CPU or on a GPU."""
    family, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("captures CUDA graphs")
    return plain_model(family, tmp_path_factory.mktemp(family), device)


@pytest.fixture(autouse=True)
def without_graphs(request: pytest.FixtureRequest) -> None:
    """Take the graphs of an earlier test away."""
    if "model" in request.fixturenames:
        use_graphs(request.getfixturevalue("model"), None)


# Relative difference of two ways to add up float32 values, over four layers.
ROUNDING = 1e-4

# Settings of generate(), number of prompts, padded tokens, and the least number of replayed steps.
WAYS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "one": ({}, 1, 0, TOKENS - 2),
    "batch": ({}, 3, 0, TOKENS - 2),
    "left padding": ({}, 3, 5, TOKENS - 2),
    "sampling": ({"do_sample": True, "top_k": 20, "num_return_sequences": 2}, 2, 5, TOKENS - 2),
    "logits": ({"output_logits": True, "return_dict_in_generate": True}, 2, 0, TOKENS - 2),
    "prompt lookup": ({"prompt_lookup_num_tokens": 4}, 1, 0, 3),
    "beams": ({"num_beams": 3}, 2, 5, TOKENS - 2),
    "static cache": ({"cache_implementation": "static", "disable_compile": True}, 2, 5, TOKENS - 2),
    "static cache with beams": ({"cache_implementation": "static", "disable_compile": True, "num_beams": 3}, 2, 5, 0),
    "static cache with hidden states": (
        {"cache_implementation": "static", "disable_compile": True, "output_hidden_states": True},
        2,
        5,
        0,
    ),
    "no cache": ({"use_cache": False}, 2, 5, 0),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, 2, 5, TOKENS - 2),
}


@pytest.mark.parametrize("way", WAYS)
def test_generate_writes_the_same_tokens(model: Any, way: str) -> None:
    settings, batch, padded, least = WAYS[way]
    inputs = prompts(model.device, batch, padded)
    if way == "prompt lookup":
        inputs = {name: t.repeat(1, 2) for name, t in inputs.items()}
    expected = written(model, inputs, **settings)
    graphs = with_graphs(model)
    assert torch.equal(written(model, inputs, **settings), expected)
    assert graphs.replays >= least
    assert least or graphs.replays == 0
    assert torch.equal(written(model, inputs, **settings), expected)


@torch.no_grad()
def steps(model: Any, tokens: Tensor, widths: list[int], padded: int = 0) -> tuple[Tensor, Any]:
    """Return the logits of ``tokens`` [B, T], read behind a prompt in pieces of ``widths`` tokens, and the cache.

    The first row begins with ``padded`` tokens of padding; without padding there is no mask.
    """
    cache: Any = DynamicCache(config=model.config)
    mask = torch.ones_like(tokens)
    mask[0, :padded] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    parts, at = [], 0
    for width in (LONG, *widths):
        piece = slice(at, at + width)
        given = {"attention_mask": mask[:, : at + width], "position_ids": places[:, piece]} if padded else {}
        part = model(tokens[:, piece], use_cache=True, **{CACHE_ARGUMENT: cache}, **given).logits
        parts.append(part[:, padded:] if at == 0 else part)
        at += width
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("padded", [0, 5])
def test_several_new_tokens_are_read_from_graphs(model: Any, padded: int) -> None:
    widths = [2, 5, 2, 1, 6, 1, 5, 2, 3, MOST_NEW, 1, 5, 2]
    tokens = longer(model, LONG + sum(widths))
    expected, before = steps(model, tokens, widths, padded)
    graphs = with_graphs(model)
    logits, cache = steps(model, tokens, widths, padded)
    assert relative(logits, expected) < ROUNDING
    # Graphs of one, two and six tokens; those of three and sixteen were only rehearsed.
    assert (graphs.captures, graphs.replays) == (3, 8)
    for ours, theirs in zip(cache.layers, before.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length() == tokens.shape[1]
        assert relative(ours.keys[:, :, padded:], theirs.keys[:, :, padded:]) < ROUNDING
        assert relative(ours.values[:, :, padded:], theirs.values[:, :, padded:]) < ROUNDING


@torch.no_grad()
def test_hidden_states_are_read_from_graphs(model: Any) -> None:
    """Steps with and without hidden states alternate on one cache, and rejected drafts are cropped."""
    tokens, found = longer(model, LONG + 40), []
    for graphed in (False, True):
        graphs = with_graphs(model) if graphed else None
        cache: Any = DynamicCache(config=model.config)
        model(tokens[:, :LONG], use_cache=True, **{CACHE_ARGUMENT: cache})
        outputs = []
        for i, width in enumerate([4, 3, 4, 1, 3, 4, 3, 4, 1, 4]):
            given = tokens[:, cache.get_seq_length() :][:, :width]
            states = {"output_hidden_states": True} if i % 3 else {}
            outputs.append(model(given, use_cache=True, **{CACHE_ARGUMENT: cache}, **states))
            cache.crop(-(width // 2))
        found.append(outputs)
    assert graphs is not None
    # Six kinds of steps are rehearsed at their first use.
    assert (graphs.reason, graphs.replays) == (None, 4)
    for ours, theirs in zip(*found[::-1], strict=True):
        assert relative(ours.logits, theirs.logits) < ROUNDING
        assert (ours.hidden_states is None) == (theirs.hidden_states is None)
        for one, other in zip(ours.hidden_states or (), theirs.hidden_states or (), strict=True):
            assert relative(one, other) < ROUNDING


def test_a_full_buffer_grows_and_is_captured_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = [4] * 16
    tokens = longer(model, LONG + sum(widths))
    monkeypatch.setattr("transmla.runtime.latent_cache.STEP", 40)
    monkeypatch.setattr("transmla.runtime.latent_cache.BATCH_STEP", 0)
    expected, _ = steps(model, tokens, widths)
    graphs = with_graphs(model)
    logits, _ = steps(model, tokens, widths)
    assert relative(logits, expected) < ROUNDING
    # A buffer that grows costs no eager step; each of the two sizes is rehearsed and captured.
    assert (graphs.captures, graphs.replays, graphs.reason) == (2, 14, None)


def test_cropped_rows_are_written_again(model: Any) -> None:
    """As when drafts are rejected."""
    tokens = longer(model, LONG + 12)

    def run() -> Tensor:
        _, cache = steps(model, tokens, [4, 4, 4])
        parts = []
        with torch.no_grad():
            for width in (3, 1, 4, 2, 4):
                cache.crop(-width)
                given = tokens[:, cache.get_seq_length() :][:, :width].flip(-1)
                parts.append(model(given, use_cache=True, **{CACHE_ARGUMENT: cache}).logits)
        return torch.cat(parts, 1)

    expected = run()
    graphs = with_graphs(model)
    assert relative(run(), expected) < ROUNDING
    assert graphs.replays >= 3


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda model: model.lm_head.weight.mul_(-1),
    "replaced": lambda model: setattr(
        model.model.layers[2].mlp.down_proj, "weight", torch.nn.Parameter(-model.model.layers[2].mlp.down_proj.weight)
    ),
    "loaded": lambda model: model.load_state_dict(
        {name: t.flip(0) if name.endswith("norm.weight") else t for name, t in model.state_dict().items()}
    ),
    "other memory": lambda model: model.model.layers[1].to(torch.float64).to(torch.float32),
    "hook": lambda model: model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: -output),
    "forward": lambda model: setattr(model.model.layers[2].mlp, "forward", lambda x: x * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_noticed_between_two_steps(model: Any, change: str) -> None:
    tokens, logits = longer(model, LONG + 9), []
    for graphed in (False, True):
        twin = copy.deepcopy(model)
        if graphed:
            with_graphs(twin)
        with torch.no_grad():
            _, cache = steps(twin, tokens, [1, 1, 1, 1])
            CHANGES[change](twin)
            parts = [
                twin(tokens[:, LONG + i : LONG + i + 1], use_cache=True, **{CACHE_ARGUMENT: cache}).logits
                for i in range(4, 9)
            ]
        logits.append(torch.cat(parts, 1))
    assert relative(logits[1], logits[0]) < ROUNDING


@pytest.mark.parametrize("family", MODELS)
def test_copies_capture_their_own_graphs(family: str, tmp_path: Path) -> None:
    model = plain_model(family, tmp_path)
    inputs = prompts(model.device)
    with_graphs(model)
    expected = written(model, inputs)
    shallow = copy.copy(model)
    assert graphs_of(shallow) is graphs_of(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, GraphedModel)
        assert graphs_of(twin) is not graphs_of(model)
        with torch.no_grad():
            twin.lm_head.weight.mul_(-1)
        assert not torch.equal(written(twin, inputs), expected)
        twin.lm_head.weight.data.mul_(-1)
        assert torch.equal(written(twin, inputs), expected)
    for one in (shallow, model):
        assert torch.equal(written(one, inputs), expected)


def test_two_caches_take_turns(model: Any) -> None:
    tokens = longer(model, LONG + 8)
    expected = [steps(model, part, [1] * 8)[0] for part in (tokens, tokens.flip(-1))]
    with_graphs(model)
    caches: list[Any] = [DynamicCache(config=model.config) for _ in range(2)]
    given = tokens, tokens.flip(-1)
    parts: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for start, stop in [(0, LONG), *((i, i + 1) for i in range(LONG, LONG + 8))]:
            for which in (0, 1):
                arguments: dict[str, Any] = {"use_cache": True, CACHE_ARGUMENT: caches[which]}
                parts[which].append(model(given[which][:, start:stop], **arguments).logits)
    for ours, theirs in zip(parts, expected, strict=True):
        assert relative(torch.cat(ours, 1), theirs) < ROUNDING


def test_a_model_is_freed_at_once(tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    use_graphs(model, DecodeGraphs())
    written(model, prompts(model.device))
    graphs = graphs_of(model)
    assert graphs is not None
    assert graphs.reason == "the model is on a CPU, and graphs need a GPU"
    freed = weakref.ref(model)
    del model, graphs
    assert freed() is None


def test_a_cache_may_have_its_old_name(model: Any) -> None:
    """As transformers takes it, with a warning from 5.24 on."""
    tokens, found = longer(model, LONG + 6), []
    for name in (CACHE_ARGUMENT, OLD_CACHE_ARGUMENT):
        cache, graphs = DynamicCache(config=model.config), with_graphs(model)
        with torch.no_grad():
            model(tokens[:, :LONG], **{name: cache})
            steps = [model(tokens[:, at : at + 1], **{name: cache}).logits for at in range(LONG, LONG + 6)]
        assert graphs.replays == 5, graphs.reason
        found.append(torch.cat(steps, 1))
    assert torch.equal(*found)
