"""How long every layer is fitted to the source after its closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from transmla.errors import TransmlaError

OFF, AUTO = "off", "auto"


@dataclass(frozen=True)
class FitSettings:
    """How a layer is fitted.

    Attributes:
        steps: of Adam.
        tokens: in one step, in whole sequences (no more than there are).
        rate: highest learning rate, in units of each tensor's root mean square; it falls to zero.
        through_mlp: measure the error after the layer's MLP; otherwise after its attention, at half the cost.
        window: consecutive layers that are fitted together. The first of them is then final, and the others start
            the next window.
        small_cache_steps: factor on ``steps`` where less than SMALL_CACHE of the cache is kept.
    """

    steps: int
    tokens: int
    rate: float
    through_mlp: bool
    window: int = 1
    small_cache_steps: float = 1.0


# Share of the source's cache below which a fit takes more steps. From 400 to 600 steps, SmolLM2-135M loses 0.5 % of its
# perplexity at half the cache, 1.1 % at a third, 1.9 % at a quarter and 6 % at an eighth
# (scripts/results/quality/full-400-steps.json and full-600-steps.json).
SMALL_CACHE = 0.4
FITS = {
    "fast": FitSettings(steps=60, tokens=2048, rate=5e-3, through_mlp=False),
    "full": FitSettings(steps=400, tokens=4096, rate=2e-3, through_mlp=True, window=2, small_cache_steps=1.5),
}


def fit_settings(name: str, cache_ratio: float, *, experts: bool = False) -> FitSettings | None:
    """Return the settings called ``name`` for a conversion that keeps ``cache_ratio`` of the cache; None for ``off``.

    Layers with ``experts`` are fitted one at a time and up to their attention, because the choice of experts is not a
    smooth function of the hidden states.
    """
    fit = FITS.get(name)
    if fit is not None and cache_ratio < SMALL_CACHE:
        fit = replace(fit, steps=round(fit.steps * fit.small_cache_steps))
    if fit is not None and experts:
        fit = replace(fit, through_mlp=False, window=1)
    return fit


def choose_fit(wanted: str, device: torch.device, sequences: int, *, baseline: str | None = None) -> tuple[str, str]:
    """Return the fit that ``wanted`` stands for, and why it is ``off`` (empty if it is not).

    ``auto`` is ``fast`` on a CPU and ``full`` on a GPU. It is ``off`` for a single calibration sequence, and for a
    ``baseline`` method (its name), which is there to be compared with as published.

    Raises:
        TransmlaError: if a fit was asked for by name and there is only one sequence.
    """
    if sequences < 2 and wanted in FITS:
        raise TransmlaError(
            f"reconstruction '{wanted}' was asked for with one calibration sequence",
            limit="it is fitted on some sequences and judged on others: at least 2",
            remedy="raise --calibration-sequences, or pass --reconstruct off",
        )
    if wanted == OFF:
        return OFF, "--reconstruct off"
    if wanted != AUTO:
        return wanted, ""
    if sequences < 2:
        return OFF, "one calibration sequence"
    if baseline is not None:
        return OFF, f"method {baseline} is a baseline"
    return ("fast" if device.type == "cpu" else "full"), ""
