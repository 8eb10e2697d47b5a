"""How much work a conversion puts into fitting every layer after its closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transmla.errors import TransmlaError


@dataclass(frozen=True)
class Effort:
    """How long a layer is fitted.

    ``steps`` of about ``tokens`` tokens (whole sequences, no more than there are), each tensor at ``rate`` times
    its root mean square, falling to zero. The error is measured after the layer's MLP (``through_mlp``) or, at
    half the cost, after its attention. ``window`` consecutive layers are fitted at once, of which the first is then
    final and the others start the next window.
    """

    steps: int
    tokens: int
    rate: float
    through_mlp: bool
    window: int = 1


EFFORTS = {
    "fast": Effort(steps=60, tokens=2048, rate=5e-3, through_mlp=False),
    "full": Effort(steps=400, tokens=4096, rate=2e-3, through_mlp=True, window=2),
}


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
