"""Run one step many times: on a GPU as a replayed CUDA graph, and with deterministic kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

from transmla.modeling.sdpa import without_cudnn

# Number of steps that run before a graph is captured; they allocate the optimizer's state and all workspaces.
EAGER = 3


def run_steps(advance: Callable[[], None], times: int, device: torch.device) -> None:
    """Call ``advance`` ``times`` times; on a GPU, capture it after EAGER calls and replay the CUDA graph instead."""
    if device.type != "cuda" or times <= EAGER:
        for _ in range(times):
            advance()
        return
    with torch.cuda.device(device):
        stream = _stream(device, "capture")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(EAGER):
                advance()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            advance()
        for _ in range(times - EAGER):
            graph.replay()


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a GPU runs work on a second stream, in parallel with the work after the context.

    Call ``wait_for_side_stream`` before the results are used. On a CPU the context does nothing.
    """
    if device.type != "cuda":
        return nullcontext()
    side = _stream(device, "side")
    side.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(side)


def wait_for_side_stream(device: torch.device) -> None:
    """Make the current stream wait for all work of ``side_stream``, so that the results can be used."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_stream(device, "side"))


@cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """Return the same stream for every call, because libraries keep one workspace for each stream they run on."""
    return torch.cuda.Stream(device)


@contextmanager
def deterministic() -> Iterator[None]:
    """Return a context in which PyTorch uses deterministic kernels only; it restores the settings at its end."""
    enabled, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        with without_cudnn():
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warned)
        memory.fill_uninitialized_memory = filled
