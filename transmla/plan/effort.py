"""How much work a conversion puts into fitting every layer after its closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from transmla.errors import TransmlaError


@dataclass(frozen=True)
class Effort:
    """How long a layer is fitted.

    ``steps`` of about ``tokens`` tokens (whole sequences, no more than there are), each tensor at ``rate`` times
    its root mean square, falling to zero. The error is measured after the layer's MLP (``through_mlp``) or, at
    half the cost, after its attention. ``window`` consecutive layers are fitted at once, of which the first is then
    final and the others start the next window. A conversion that keeps less than ``HARD`` of the cache has more to
    repair, and takes ``hard`` times as many steps.
    """

    steps: int
    tokens: int
    rate: float
    through_mlp: bool
    window: int = 1
    hard: float = 1.0


# From 400 to 600 steps, SmolLM2-135M loses 0.5 % of its perplexity at half the cache, 1.1 % at a third, 1.9 % at a
# quarter, 6 % at an eighth (scripts/results/quality-full-400-steps.json, -600-).
HARD = 0.4
EFFORTS = {
    "fast": Effort(steps=60, tokens=2048, rate=5e-3, through_mlp=False),
    "full": Effort(steps=400, tokens=4096, rate=2e-3, through_mlp=True, window=2, hard=1.5),
}


def effort_for(name: str, cache_ratio: float) -> Effort | None:
    """The effort called ``name`` where ``cache_ratio`` of the source's cache is kept; None for ``off``."""
    effort = EFFORTS.get(name)
    if effort is None or cache_ratio >= HARD:
        return effort
    return replace(effort, steps=round(effort.steps * effort.hard))


def attention_alone(effort: Effort) -> Effort:
    """The same ``effort`` up to the stream after the attention, one layer at a time.

    For layers with experts: which of them a token takes is no smooth function of the stream.
    """
    return replace(effort, through_mlp=False, window=1)


def choose_effort(wanted: str, device: torch.device, sequences: int, *, published: bool = False) -> str:
    """The effort that ``auto`` stands for: ``fast`` on a CPU, ``full`` on a GPU.

    ``off`` for a single sequence, and for a ``published`` method, which is there to be compared with as it is.

    Raises:
        TransmlaError: if an effort was asked for by name and there is nothing to judge it on.
    """
    if sequences < 2 and wanted in EFFORTS:
        raise TransmlaError(
            f"reconstruction '{wanted}' was asked for with one calibration sequence",
            limit="it is fitted on some sequences and judged on others: at least 2",
            remedy="raise --calibration-sequences, or pass --reconstruct off",
        )
    if wanted != "auto":
        return wanted
    if sequences < 2 or published:
        return "off"
    return "fast" if device.type == "cpu" else "full"
