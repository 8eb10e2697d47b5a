"""A conversion makes no tensor larger than the largest of its source: no whole embedding in a wider precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_source
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transmla.convert.pipeline import convert
from transmla.recipe import Recipe

# The embedding is larger than the other matrices, and than the logits of the signature's tokens.
WORDS, WIDTH = 6_000, 720


class Largest(TorchDispatchMode):
    """Records the largest storage on the CPU that an operation returns, in bytes, and the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # Memory that is only reserved, as for a model without weights, is never touched.
            reserved = func is torch.ops.aten.empty.memory_format
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and not reserved:
                size = tensor.untyped_storage().nbytes()
                if size > self.size:
                    self.size, self.operation = size, str(func)
        return result


@pytest.mark.parametrize("tied", [True, False])
def test_no_tensor_is_larger_than_the_largest_of_the_source(
    tied: bool, tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("layers", "probe"):
        monkeypatch.setattr(f"transmla.signature.{module}.NUMBERS", 2**18)
    shape = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2, "tie_word_embeddings": tied}
    source = save_source(tmp_path / "source", dtype=torch.bfloat16, **shape)
    with Largest() as largest:
        convert(make_recipe(source))
    assert largest.size == torch.bfloat16.itemsize * WORDS * WIDTH, largest.operation
