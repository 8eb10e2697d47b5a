"""Run one step many times, on a GPU as a replayed CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import count

import torch
from torch import distributed

# Number of steps that run before a graph is captured; they allocate the optimizer's state and all workspaces.
EAGER = 3


class Graphs:
    """Makes CUDA graphs that share their memory, for functions that are called in turn."""

    def __init__(self, device: torch.device) -> None:
        """Prepare for functions that work on ``device``."""
        self.device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def captured(
        self, function: Callable[[], None], refused: Callable[[str], None] | None = None
    ) -> Callable[[], None]:
        """Return a function that does the same. On a GPU, it is captured after EAGER calls, and replayed from then on.

        The function must leave results in tensors that exist after its first call. One exception: a function may leave
        tensors for the function that is called next, if both are always called together.

        Args:
            function: the step.
            refused: is called with the reason if the step cannot be captured, and the step then runs as it is; None
                raises the error.
        """
        if self.device.type != "cuda":
            return function
        graph, calls, eager = torch.cuda.CUDAGraph(), count(), False
        # The thread that watches NCCL's work reads events, which would end a capture of all threads.
        mode = "thread_local" if distributed.is_initialized() else "global"

        def call() -> None:
            nonlocal eager
            number = next(calls)
            with torch.cuda.device(self.device):
                stream = stream_for(self.device, "capture")
                if number < EAGER or eager:
                    stream.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(stream):
                        function()
                    torch.cuda.current_stream().wait_stream(stream)
                    return
                if number == EAGER:
                    try:
                        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode=mode):
                            function()
                    except RuntimeError as error:
                        if refused is None:
                            raise
                        refused(str(error).partition("\n")[0])
                        eager = True
                        call()
                        return
                graph.replay()

        return call


def in_turn(*functions: Callable[[], None]) -> None:
    """Call each of the ``functions`` in order."""
    for function in functions:
        function()


@cache
def stream_for(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """Return the stream for a ``purpose``: always the same, because libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)
