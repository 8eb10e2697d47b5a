"""Run one step many times: on a GPU as a replayed CUDA graph, and with deterministic kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import distributed

from transmla.modeling.sdpa import without_cudnn

# Number of steps that run before a graph is captured; they allocate the optimizer's state and all workspaces.
EAGER = 3


class Graphs:
    """Makes CUDA graphs that share their memory, for functions that are called in turn."""

    def __init__(self, device: torch.device) -> None:
        """Prepare for functions that work on ``device``."""
        self.device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def captured(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does the same. On a GPU, it is captured after EAGER calls, and replayed from then on.

        The function must leave results in tensors that exist after its first call. One exception: a function may leave
        tensors for the function that is called next, if both are always called together.
        """
        if self.device.type != "cuda":
            return function
        graph, calls = torch.cuda.CUDAGraph(), count()
        # The thread that watches NCCL's work reads events, which would end a capture of all threads.
        mode = "thread_local" if distributed.is_initialized() else "global"

        def call() -> None:
            number = next(calls)
            with torch.cuda.device(self.device):
                stream = _stream(self.device, "capture")
                if number < EAGER:
                    stream.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(stream):
                        function()
                    torch.cuda.current_stream().wait_stream(stream)
                    return
                if number == EAGER:
                    with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode=mode):
                        function()
                graph.replay()

        return call


def in_turn(*functions: Callable[[], None]) -> None:
    """Call each of the ``functions`` in order."""
    for function in functions:
        function()


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
