"""Capture of a function into a CUDA graph, and its replay."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from threading import get_ident
from typing import Any, Protocol

import torch

# Part of torch's warning of an operation that waits for the GPU.
WAITS = "synchronizing CUDA operation"


class Recorder(Protocol):
    """Captures functions that work on fixed memory."""

    def refuses(self, device: torch.device) -> str | None:
        """Return why functions on ``device`` cannot be captured, or None."""

    def turn(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context for one step. Steps on different streams run one after the other."""

    def rehearse(self, function: Callable[[], None]) -> None:
        """Call ``function`` as it will be captured, so that kernels are compiled and workspaces allocated."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture ``function``, without running it, and return what repeats it."""


class CudaRecorder:
    """Recorder of CUDA graphs, which share one memory pool. The pool is freed with the recorder and its graphs."""

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._stream: Any = None
        self._pool: Any = None
        self._anchor: Any = None
        self._done: Any = None

    def refuses(self, device: torch.device) -> str | None:
        """Return why functions on ``device`` cannot be captured, or None."""
        if device.type != "cuda":
            return f"the model is on a {device.type.upper()}, and graphs need a GPU"
        if torch.cuda.is_current_stream_capturing():
            return "another capture is under way"
        return None

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """Run one step on ``device`` behind the last one. Graphs share memory, so that no two may run at once."""
        with torch.cuda.device(device):
            if device != self._device:
                self._prepare(device)
            current = torch.cuda.current_stream()
            current.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(current)

    def rehearse(self, function: Callable[[], None]) -> None:
        """Call ``function`` on the capturing stream, because libraries keep one workspace for each stream.

        Raises:
            RuntimeError: if ``function`` waits for the GPU, which a graph cannot.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), waits_of_this_thread() as waits:
            function()
        current.wait_stream(self._stream)
        if waits:
            raise RuntimeError("an operation waits for the GPU")

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture ``function`` into a graph and return the graph's ``replay``."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        # torch.cuda.graph would also collect garbage and return all cached memory to the driver, in every generate().
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
                graph.capture_end()
            except BaseException:
                self._give_up(graph)
                raise
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay

    def _prepare(self, device: torch.device) -> None:
        """Make the stream and the memory pool for ``device``, the current one."""
        self._stream, self._done = torch.cuda.Stream(), torch.cuda.Event()
        self._pool, self._anchor = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        # A pool cannot be used again once all its graphs are gone. This empty graph keeps it between two caches.
        with warnings.catch_warnings(), torch.cuda.stream(self._stream):
            warnings.simplefilter("ignore")
            self._anchor.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            self._anchor.capture_end()
        self._done.record()
        self._device = device

    def _give_up(self, graph: Any) -> None:
        """End a capture that failed, and repair what torch would leave behind.

        Allocations would still be routed to the pool, and the random generator would refuse to work outside of a
        capture. The capture of an empty graph resets the generator.
        """
        assert self._device is not None
        with suppress(RuntimeError):
            graph.capture_end()
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        self._prepare(self._device)


@contextmanager
def waits_of_this_thread() -> Iterator[list[str]]:
    """Return a context that lists torch's warnings of operations in which this thread waits for the GPU."""
    found: list[str] = []
    thread, mode, show = get_ident(), torch.cuda.get_sync_debug_mode(), warnings.showwarning

    def note(message: Any, *args: Any, **kwargs: Any) -> None:
        if WAITS not in str(message):
            show(message, *args, **kwargs)
        elif get_ident() == thread:
            found.append(str(message))

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{WAITS}")
        warnings.filterwarnings("ignore", message=".*Synchronization debug mode is a prototype")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
