"""A second stream of work on a GPU, in parallel with the first."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from transmla.cuda_graphs import stream_for


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a GPU runs work on a second stream, in parallel with the work after the context.

    Call ``wait_for_side_stream`` before the results are used. On a CPU the context does nothing.
    """
    if device.type != "cuda":
        return nullcontext()
    side = stream_for(device, "side")
    side.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(side)


def wait_for_side_stream(device: torch.device) -> None:
    """Make the current stream wait for all work of ``side_stream``, so that the results can be used."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(stream_for(device, "side"))
