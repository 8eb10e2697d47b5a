"""Measure how long a conversion spends on each phase of its layers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Phases of a layer, in order. "observe" runs calibration text through the source's and the converted layer.
PHASES = ("read", "observe", "factorise", "fit", "write")


class Phases:
    """Sums of the seconds of each phase.

    Attributes:
        seconds: the sums by phase.
    """

    def __init__(self, device: torch.device) -> None:
        """Prepare for work on ``device``."""
        self.device, self.seconds = device, dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time of the block to ``phase``. A GPU finishes the block's work before it ends."""
        began = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] += time.monotonic() - began
