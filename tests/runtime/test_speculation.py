"""Speculative decoding: several new tokens a step through the absorbed form, and no token changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour import relative, stock_model, tokens
from helpers.graph_models import MODELS, plain_model, prompts, with_graphs, written
from torch import Tensor
from transformers import DynamicCache

import transmla
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.graphed_model import use_graphs
from transmla.runtime.latent_attention import LatentAttention


def counted(model: Any) -> list[int]:
    """Return a list that receives the number of new tokens at every later call of the backend."""
    numbers: list[int] = []
    for layer in model.modules():
        if isinstance(layer, LatentAttention):

            def decode(q_latent: Tensor, *args: Any, inner: Any = layer.decode) -> Any:
                numbers.append(q_latent.shape[1])
                return inner(q_latent, *args)

            layer.decode = decode
    return numbers


def drafted(model: Any, assistant: Any, way: str) -> Tensor:
    inputs = {name: t.repeat(1, 2) for name, t in prompts(model.device, 1).items()}
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "prompt lookup": {"prompt_lookup_num_tokens": 5},
        "assistant": {"assistant_model": assistant},
    }
    return written(model, inputs, **settings[way])


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_drafts_change_no_token(family: str, graphs: bool, tmp_path: Path) -> None:
    model, assistant = (plain_model(family, tmp_path / str(i)) for i in range(2))
    with torch.no_grad():  # a draft model that is right at times
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight), alpha=0.1)
    expected = drafted(model, assistant, "plain")
    numbers = counted(model)
    if graphs:
        with_graphs(model)
    for way in ("prompt lookup", "assistant"):
        numbers.clear()
        assert torch.equal(drafted(model, assistant, way), expected)
        assert max(numbers) > 1, way
    assert len(numbers) < 24 * 4, "drafts are accepted"


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_hidden_states_are_those_of_the_stock_model(family: str, graphs: bool, tmp_path: Path) -> None:
    """Draft heads (EAGLE) read hidden states of several layers in every step."""
    stock = stock_model(family, tmp_path / "stock", keep=())
    model = transmla.accelerate(stock_model(family, tmp_path / "ours", keep=()), cuda_graphs=False)
    used = with_graphs(model) if graphs else None
    found: list[list[Tensor]] = []
    for one in (stock, model):
        cache: Any = DynamicCache(config=one.config)
        given = {"use_cache": True, "output_hidden_states": True, CACHE_ARGUMENT: cache}
        with torch.no_grad():
            steps = [one(tokens()[:, a:b], **given).hidden_states for a, b in ((0, 8), (8, 9), (9, 13), (13, 14))]
        assert all(len(states) == one.config.num_hidden_layers + 1 for states in steps)
        found.append([torch.cat(parts, 1) for parts in zip(*steps, strict=True)])
    for ours, theirs in zip(*found[::-1], strict=True):
        assert relative(ours, theirs) < 1e-5
    if used is not None:
        # The hooks that transformers keeps afterwards do nothing in other steps.
        written(model, prompts(model.device))
        assert used.replays > 0
        use_graphs(model, None)
