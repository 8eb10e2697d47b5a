"""Time calls on a GPU by replays of a CUDA graph, which leaves the host's time out."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch


def replay_seconds(call: Callable[[], Any], calls: int, replays: int = 7) -> float:
    """Return the median seconds of one call, over ``replays`` of a CUDA graph of ``calls`` calls."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / calls)
    return statistics.median(times)
