"""What cannot be captured runs eagerly with the same result, and the reason is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour import relative, stock_model
from helpers.graph_models import LONG, Repeating, longer, plain_model, prompts, with_graphs, written
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import transmla
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.decode_graphs import DecodeGraphs
from transmla.runtime.graphed_model import graphs_of, use_graphs


class Doubled(nn.Linear):
    """A layer of a foreign package."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def foreign(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.down_proj.__class__ = Doubled


def hooked(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: None)


def replaced(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: x


# A change of the model and the reason that it gives.
MODELS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "foreign module": (foreign, "Doubled is a module of"),
    "hook": (hooked, "modules have hooks"),
    "forward": (replaced, "the forward function of a"),
    "quantiser": (lambda model: setattr(model, "hf_quantizer", object()), "weights are quantised or sharded"),
    "attention": (lambda model: model.set_attn_implementation("sdpa"), "the attention is 'sdpa'"),
    "dropout": (lambda model: model.train(), "the model is in training mode"),
    "config": (lambda model: setattr(model.config, "output_hidden_states", True), "the config asks for hidden states"),
}


def steps(model: Any, cache: Any, context: Any = contextlib.nullcontext, **given: Any) -> Tensor:
    """Return the logits of three steps behind a prompt, with ``given`` arguments and in ``context``."""
    tokens, parts = longer(model, LONG + 3), []
    with torch.no_grad(), context():
        model(tokens[:, :LONG], use_cache=True, **{CACHE_ARGUMENT: cache})
        for i in range(LONG, LONG + 3):
            output = model(tokens[:, i : i + 1], **{"use_cache": True, CACHE_ARGUMENT: cache, **given})
            parts.append(output["logits"] if hasattr(output, "keys") else output[0])
    return torch.cat(parts, 1)


@pytest.mark.parametrize("change", MODELS)
def test_a_model_that_cannot_be_captured(change: str, tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    MODELS[change][0](model)
    use_graphs(model, None)
    expected = steps(model, DynamicCache(config=model.config))
    graphs = with_graphs(model)
    assert relative(steps(model, DynamicCache(config=model.config)), expected) < 1e-6
    assert graphs.replays == 0
    assert graphs.reason is not None
    assert graphs.reason.startswith(MODELS[change][1])


def test_layers_with_the_sources_attention_rule_graphs_out(tmp_path: Path) -> None:
    model = transmla.accelerate(stock_model("llama", tmp_path))
    graphs = with_graphs(model)
    written(model, prompts("cpu"))
    assert graphs.reason == "1 layers kept the source's attention"


# A way to call the model and the reason that it gives.
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "some hidden states": ({"output_hidden_states": [0]}, "the argument output_hidden_states"),
    "tuple": ({"return_dict": False}, "return_dict is False"),
    "some logits": ({"logits_to_keep": torch.tensor([0])}, "logits_to_keep is a tensor"),
    "short mask": ({"attention_mask": torch.ones(2, 3)}, "an attention mask of shape [2, 3]"),
    "three positions": ({"position_ids": torch.ones(3, 2, 1, dtype=torch.int64)}, "position_ids of shape [3, 2, 1]"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_cannot_be_captured(call: str, tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    given, reason = CALLS[call]
    found: list[Any] = []
    graphs = None
    for graphed in (False, True):
        graphs = with_graphs(model) if graphed else None
        try:
            found.append(steps(model, DynamicCache(config=model.config), **given))
        except (RuntimeError, ValueError, IndexError) as error:
            found.append(type(error))
    assert graphs is not None
    assert (graphs.replays, graphs.reason) == (0, reason)
    assert found[0] is found[1] if isinstance(found[0], type) else torch.equal(*found)


CONTEXTS: dict[str, tuple[Any, str]] = {
    "gradients": (torch.enable_grad, "gradients are enabled"),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), "autocast is enabled"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_that_cannot_be_captured(name: str, tmp_path: Path) -> None:
    model, (context, reason) = plain_model("llama", tmp_path), CONTEXTS[name]
    graphs = with_graphs(model)
    steps(model, DynamicCache(config=model.config), context)
    assert (graphs.replays, graphs.reason) == (0, reason)


def test_caches_of_other_classes(tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    graphs = with_graphs(model)
    tokens = longer(model, LONG + 3)
    steps(model, StaticCache(config=model.config, max_cache_len=64))
    assert (graphs.replays, graphs.reason) == (0, "a step over a static cache without position_ids")
    offloaded: Any = DynamicCache(config=model.config)
    offloaded.offloading = True
    assert graphs._read(model, {"input_ids": tokens[:, :1], CACHE_ARGUMENT: offloaded}) == "the cache is offloaded"
    prefix = transmla.shared_prefix(model, tokens[:1, :LONG])
    model.generate(tokens[:1, : LONG + 1], max_new_tokens=4, **{CACHE_ARGUMENT: prefix})
    assert (graphs.replays, graphs.reason) == (0, "the cache is a PrefixCache")


def test_inference_mode_may_be_left_and_entered(tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    tokens, found = longer(model, LONG + 12), []
    for graphed in (False, True):
        graphs = with_graphs(model) if graphed else None
        cache: Any = DynamicCache(config=model.config)
        parts = []
        for i in range(LONG, LONG + 12):
            with torch.inference_mode() if (i - LONG) % 8 < 4 else torch.no_grad():
                if i == LONG:
                    model(tokens[:, :LONG], use_cache=True, **{CACHE_ARGUMENT: cache})
                part = model(tokens[:, i : i + 1], use_cache=True, **{CACHE_ARGUMENT: cache}).logits
                parts.append(part.clone())
        found.append(torch.cat([part.detach().clone() for part in parts], 1))
    assert relative(found[1], found[0]) < 1e-5
    assert graphs is not None
    assert graphs.replays > 4


class Failing(Repeating):
    """Recorder whose captures fail."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        function()
        raise RuntimeError("operation not permitted")


def test_a_failed_capture_is_not_tried_again_until_the_model_changes(tmp_path: Path) -> None:
    model, inputs, recorder = plain_model("llama", tmp_path), prompts("cpu", padded=3), Failing()
    expected = written(model, inputs)
    use_graphs(model, DecodeGraphs(recorder))
    graphs = graphs_of(model)
    assert graphs is not None
    for _ in range(2):
        assert torch.equal(written(model, inputs), expected)
    assert (recorder.recorded, graphs.replays) == (1, 0)
    assert graphs.reason == "the step cannot be captured: operation not permitted"
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert torch.equal(written(model, inputs), expected)
    assert recorder.recorded == 2


def test_threads_share_the_graphs_of_a_model(tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    inputs = [prompts("cpu", batch) for batch in (1, 2, 3)]
    expected = [written(model, one) for one in inputs]
    graphs = with_graphs(model)
    with ThreadPoolExecutor(3) as pool:
        found = [*pool.map(lambda one: written(model, one), inputs * 2)]
    assert all(torch.equal(*pair) for pair in zip(found, expected * 2, strict=True))
    # The second generate() of a shape captures its first step without a rehearsal.
    assert graphs.replays == 3 * 22 + 3 * 23


def test_graphs_can_be_switched_off(tmp_path: Path) -> None:
    model = transmla.accelerate(stock_model("llama", tmp_path, keep=()), cuda_graphs=False)
    assert graphs_of(model) is None
    transmla.accelerate(model)
    assert graphs_of(model) is not None
    transmla.accelerate(model, cuda_graphs=False)
    assert graphs_of(model) is None


@pytest.mark.parametrize("family", ["mistral", "olmo3", "gemma3_text"])
def test_windows_are_kept_over_a_cache_that_does_not_know_them(family: str, tmp_path: Path) -> None:
    model = plain_model(family, tmp_path)
    expected = steps(model, DynamicCache())
    graphs = with_graphs(model)
    assert relative(steps(model, DynamicCache()), expected) < 1e-6
    assert (graphs.replays, graphs.reason) == (0, "layers have sliding windows")
