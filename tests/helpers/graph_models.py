"""Models of both formats, and a recorder that repeats functions instead of capturing them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import transmla
from helpers.behaviour import stock_model
from helpers.mla_models import tiny
from transmla.runtime.decode_graphs import DecodeGraphs
from transmla.runtime.graphed_model import graphs_of, use_graphs

# The first has the architecture of a native export. The others are exports in the transmla format, with plain
# projections and with norms of queries and keys.
MODELS = ("deepseek_v3", "llama", "qwen3")
# Devices of the tests: on a GPU, steps are captured.
DEVICES = ("cpu", "cuda")
# Tokens that a model writes, and tokens of a prompt.
TOKENS, LONG = 24, 20


class Repeating:
    """Recorder for any device: it calls a function again instead of replaying it."""

    def __init__(self) -> None:
        self.rehearsed = self.recorded = 0

    def refuses(self, device: torch.device) -> str | None:
        return None

    def turn(self, device: torch.device) -> Any:
        return nullcontext()

    def rehearse(self, function: Callable[[], None]) -> None:
        self.rehearsed += 1
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return function


def plain_model(family: str, folder: Path, device: str = "cpu") -> Any:
    """Return an accelerated model of four latent layers, without experts and without graphs."""
    native = family == "deepseek_v3"
    model = tiny(num_hidden_layers=4, first_k_dense_replace=4) if native else stock_model(family, folder, keep=())
    return transmla.accelerate(model.to(device), cuda_graphs=False)


def with_graphs(model: Any) -> DecodeGraphs:
    """Give ``model`` graphs, on a CPU repeated ones, and return them."""
    use_graphs(model, DecodeGraphs(None if model.device.type == "cuda" else Repeating()))
    graphs = graphs_of(model)
    assert graphs is not None
    return graphs


def prompts(device: Any, batch: int = 2, padded: int = 0) -> dict[str, Tensor]:
    """Return tokens and mask [batch, LONG], with ``padded`` tokens on the left of the first row."""
    tokens = torch.randint(3, 60, (batch, LONG), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    tokens[0, :padded], mask[0, :padded] = 1, 0
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}


def written(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    """Return the tokens that ``model`` writes."""
    torch.manual_seed(3)
    fixed = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 1}
    result = model.generate(**inputs, **(fixed | settings))
    return result if isinstance(result, Tensor) else result.sequences


def longer(model: Any, total: int) -> Tensor:
    """Return random tokens [2, total] on the device of ``model``."""
    return torch.randint(3, 60, (2, total), generator=torch.Generator().manual_seed(2)).to(model.device)
