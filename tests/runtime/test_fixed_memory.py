"""Parts of a step on fixed memory: the snapshot of a model, the rows of a layer, and results that are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.behaviour import relative
from helpers.graph_models import LONG, longer, plain_model, with_graphs
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache

from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.graphable import Snapshot
from transmla.runtime.latent_cache import LatentLayer
from transmla.runtime.step_cache import Step

CHANGES: dict[str, Callable[[Any], Any]] = {
    "memory": lambda model: model.lm_head.double().float(),
    "parameter": lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight.detach().clone())),
    "module": lambda model: setattr(model.model.layers[1].mlp, "act_fn", nn.ReLU()),
    "buffer": lambda model: setattr(model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq.clone()),
    "hook": lambda model: model.model.norm.register_forward_hook(lambda *_: None),
    "forward": lambda model: setattr(model.model.norm, "forward", model.model.norm.forward),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_snapshot_notices_changes(change: str, tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    snapshot = Snapshot(model)
    assert snapshot.holds(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert snapshot.holds(model)
    CHANGES[change](model)
    assert not snapshot.holds(model)


def test_weights_without_memory_of_their_own_are_refused(tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    head = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(TwoTensor(head, head.clone()), requires_grad=False)
    snapshot = Snapshot(model)
    assert snapshot.refusal == "weights are quantised or sharded"
    assert snapshot.holds(model)


def test_a_snapshot_notices_hooks_for_all_modules(tmp_path: Path) -> None:
    model = plain_model("llama", tmp_path)
    snapshot = Snapshot(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not snapshot.holds(model)
        assert Snapshot(model).refusal == "modules have hooks"
    finally:
        handle.remove()
    assert snapshot.holds(model)


def test_a_buffer_that_an_eager_step_replaced_is_captured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transmla.runtime.latent_cache.STEP", 40)
    monkeypatch.setattr("transmla.runtime.latent_cache.BATCH_STEP", 0)
    model = plain_model("llama", tmp_path)
    tokens, found = longer(model, LONG + 60), []
    for graphed in (False, True):
        graphs = with_graphs(model) if graphed else None
        cache: Any = DynamicCache(config=model.config)
        parts, buffers = [], set()
        with torch.no_grad():
            model(tokens[:, :LONG], use_cache=True, **{CACHE_ARGUMENT: cache})
            for i in range(LONG, LONG + 60):
                # The buffer is full within the steps that cannot be captured.
                given = {"output_hidden_states": [0] if LONG + 30 < i < LONG + 50 else None}
                parts.append(model(tokens[:, i : i + 1], use_cache=True, **{CACHE_ARGUMENT: cache}, **given).logits)
                buffers.add(id(cache.layers[0].rows))
        found.append(torch.cat(parts, 1))
        assert len(buffers) == 2
    assert relative(found[1], found[0]) < 1e-5
    assert graphs is not None
    assert graphs.captures == 2


def test_results_are_copies(tmp_path: Path) -> None:
    """A replay overwrites the output of the step."""
    model = plain_model("llama", tmp_path)
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        model(longer(model, LONG), use_cache=True, **{CACHE_ARGUMENT: cache})
        step = Step(cache.layers, 2, 1, masked=False)
        step.inputs.fill(longer(model, 1), None, LONG)
        step.run(type(model).__mro__[0].forward, model)
    result = step.result(cache, 1, 0)
    assert result.logits.data_ptr() != step.output.logits.data_ptr()
    assert torch.equal(result.logits, step.output.logits)
    assert result[CACHE_ARGUMENT] is cache


def test_rows_that_were_counted_are_shown() -> None:
    layer = LatentLayer()
    rows = torch.randn(2, 1, 9, 4), torch.randn(2, 1, 9, 2)
    layer.update(*(part[:, :, :7] for part in rows))
    assert layer.has_room(2)
    layer.buffer()[:, :, 7:9].copy_(torch.cat([part[:, :, 7:] for part in rows], -1))
    layer.advance(2)
    assert layer.get_seq_length() == 9
    assert torch.equal(layer.keys, rows[0])
    layer.advance(1)
    layer.crop(-2)
    assert layer.get_seq_length() == 8
    assert torch.equal(layer.values, rows[1][:, :, :8])
    assert not layer.has_room(layer.buffer().shape[2])
