"""A model without weights reserves no memory for them, and a signed layer keeps its matrices as they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_sources import build_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from transmla.families.base import TINY
from transmla.signature.layers import LayerByLayer
from transmla.source.describe import empty_model
from transmla.source.open_source import open_path


class Reserved(TorchDispatchMode):
    """Records the largest storage on the CPU that an operation returns, in bytes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_empty_model_reserves_no_weights(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts of a layer of a 671B model are one parameter of 30 GB in float32."""
    monkeypatch.setattr("transmla.source.describe.LARGE", 20_000)
    sizes = {"vocab_size": 4000, "hidden_size": 600, "intermediate_size": 1000, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **{**TINY, **sizes})
    with Reserved() as reserved:
        model = empty_model(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert reserved.size < 100_000


def test_matrices_outside_the_attention_are_signed_as_stored(tmp_path: Path) -> None:
    build_model().to(torch.bfloat16).save_pretrained(tmp_path)
    source = open_path(tmp_path)
    run = LayerByLayer(source.model, source.checkpoint, source.family, "cpu")
    layer = run._layer(0, source.checkpoint.layer("model.layers.0."))
    dtypes = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    assert dtypes.pop("mlp.gate_proj.weight") == dtypes.pop("mlp.up_proj.weight") == torch.bfloat16
    assert dtypes.pop("mlp.down_proj.weight") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float64}
