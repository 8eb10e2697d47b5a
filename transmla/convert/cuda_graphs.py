"""Run one step many times: on a GPU as a replayed CUDA graph, and with deterministic kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

from transmla.modeling.sdpa import without_cudnn

# Number of steps that run before a graph is captured; they allocate the optimizer's state and all workspaces.
EAGER = 3


def run_steps(advances: Sequence[Callable[[], None]], kinds: Sequence[int], device: torch.device) -> None:
    """Call ``advances[kind]`` for each of the ``kinds`` in order.

    On a GPU, each function is captured after EAGER calls, and its CUDA graph is replayed from then on. The graphs share
    their memory, so the functions must leave results in tensors that exist after their first call.
    """
    if device.type != "cuda":
        for kind in kinds:
            advances[kind]()
        return
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    calls = [0] * len(advances)
    with torch.cuda.device(device):
        stream, pool = _stream(device, "capture"), torch.cuda.graph_pool_handle()
        for kind in kinds:
            if calls[kind] < EAGER:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    advances[kind]()
                torch.cuda.current_stream().wait_stream(stream)
                calls[kind] += 1
                continue
            if kind not in graphs:
                graphs[kind] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[kind], pool=pool, stream=stream):
                    advances[kind]()
            graphs[kind].replay()


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
