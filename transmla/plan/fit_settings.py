"""Settings of the fit that follows each layer's closed-form factors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from transmla.errors import TransmlaError

OFF, AUTO = "off", "auto"


@dataclass(frozen=True)
class FitSettings:
    """Settings of one layer's fit.

    Attributes:
        steps: number of Adam steps.
        tokens: tokens in one step, rounded down to whole rows, but at least one row.
        rate: peak learning rate, in units of each tensor's root mean square; it decays to zero.
        through_mlp: measure the error after the layer's MLP; otherwise after its attention, at half the cost.
        window: number of consecutive layers that are fitted together. Only the first is final after the fit; the
            others are starting points for the next window.
        small_cache_steps: factor on ``steps`` if the export keeps less than SMALL_CACHE of the source's cache.
    """

    steps: int
    tokens: int
    rate: float
    through_mlp: bool
    window: int = 1
    small_cache_steps: float = 1.0


# Share of the source's cache below which a fit takes more steps. With 600 instead of 400 steps, the
# perplexity of SmolLM2-135M falls by 0.5 % at half the cache, 1.1 % at a third, 1.9 % at a quarter and 6 % at an eighth
# (scripts/results/quality/full-400-steps.json and full-600-steps.json).
SMALL_CACHE = 0.4
# Tokens in the rows of a short step. One step in WHOLE_EVERY takes whole sequences, if they are at least twice as long.
SHORT, WHOLE_EVERY = 2048, 4
# Layers with more weights outside the attention take fewer steps, in proportion but at least FEWEST_STEPS of them, so
# that a model of eight billion weights takes minutes.
LARGE_LAYER, FEWEST_STEPS = 60_000_000, 0.5
# Values of ``--reconstruct`` that fit layers, with their settings.
FITS = {
    "fast": FitSettings(steps=60, tokens=2048, rate=5e-3, through_mlp=False),
    "full": FitSettings(steps=600, tokens=4096, rate=2e-3, through_mlp=True, window=2, small_cache_steps=1.5),
}


def fit_settings(
    name: str, cache_ratio: float, *, layer_parameters: int = 0, experts: bool = False
) -> FitSettings | None:
    """Return the settings of a fit.

    Args:
        name: name of the fit, a key of FITS, or ``off``.
        cache_ratio: share of the source's cache that the export keeps.
        layer_parameters: weights outside the attention in the largest layer.
        experts: whether layers have experts. Such layers are fitted one at a time, with the error after the attention,
            because the choice of experts is not a smooth function of the hidden states.

    Returns:
        The settings; None for ``off``.
    """
    fit = FITS.get(name)
    if fit is not None and cache_ratio < SMALL_CACHE:
        fit = replace(fit, steps=round(fit.steps * fit.small_cache_steps))
    if fit is not None and experts:
        fit = replace(fit, through_mlp=False, window=1)
    if fit is not None and fit.through_mlp and layer_parameters > LARGE_LAYER:
        fit = replace(fit, steps=round(fit.steps * max(FEWEST_STEPS, LARGE_LAYER / layer_parameters)))
    return fit


def parts_of_step(processes: int, rows: int, length: int, heads: int) -> int:
    """Return in how many parts ``processes`` compute a step with ``rows`` sequences of ``length`` tokens.

    The sequences are divided, or else their tokens, and the ``heads`` query heads in the attention. If neither is
    possible, each process computes the whole step: one part.
    """
    return processes if rows % processes == 0 or min(length, heads) >= processes else 1


def choose_fit(requested: str, device: torch.device, sequences: int, *, baseline: str | None = None) -> tuple[str, str]:
    """Resolve ``auto``, and explain why layers are not fitted.

    Args:
        requested: value of ``--reconstruct``. ``auto`` means ``fast`` on a CPU and ``full`` on a GPU, except that it
            means ``off`` for a single calibration sequence and for a baseline method.
        device: the device that converts.
        sequences: number of calibration sequences.
        baseline: name of the method if it is a baseline, whose published algorithm has no fit; otherwise None.

    Returns:
        The name of the fit, and the reason if it is ``off`` (otherwise an empty string).

    Raises:
        TransmlaError: if ``requested`` names a fit and there is only one sequence.
    """
    if sequences < 2 and requested in FITS:
        raise TransmlaError(
            f"--reconstruct {requested} was given one calibration sequence",
            limit="a fit needs at least 2: one to fit on, and one held-out sequence to evaluate on",
            remedy="raise --calibration-sequences, or pass --reconstruct off",
        )
    if requested == OFF:
        return OFF, "--reconstruct off"
    if requested != AUTO:
        return requested, ""
    if sequences < 2:
        return OFF, "one calibration sequence"
    if baseline is not None:
        return OFF, f"method {baseline} is a baseline"
    return ("fast" if device.type == "cpu" else "full"), ""
