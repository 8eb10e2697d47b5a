"""Models of both formats, and a recorder that repeats functions instead of capturing them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

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
