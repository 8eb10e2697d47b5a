"""Running one step many times: as a CUDA graph where there is a GPU, with the same bits every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Steps run before a graph is captured, so that the optimizer's state and all workspaces exist.
EAGER = 3


def run_steps(advance: Callable[[], None], times: int, device: torch.device) -> None:
    """Call ``advance`` ``times`` times; on a GPU all but the first few as one CUDA graph, replayed."""
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
    """Work that a GPU does at the same time as what follows, until ``wait_for_side_stream``; elsewhere, just work."""
    if device.type != "cuda":
        return nullcontext()
    side = _stream(device, "side")
    side.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(side)


def wait_for_side_stream(device: torch.device) -> None:
    """Let what follows see all that was done ``side_stream``."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_stream(device, "side"))


@cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """The same stream every time: libraries keep a workspace for every stream they ever saw."""
    return torch.cuda.Stream(device)


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels that give the same bits every time.

    PyTorch's flash and memory-efficient attention have such backward passes where they are insisted on.
    """
    enabled, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warned)
        memory.fill_uninitialized_memory = filled
