"""Sums of an evaluation by window and position: standard errors, and KL by position in the window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The values of a prediction, in this order.
QUANTITIES = ("nll", "baseline_nll", "kl", "top1_agreement")
# The means of an evaluation. All but the first need a baseline.
MEANS = ("nll", "baseline_nll", "nll_difference", "kl", "top1_agreement")


@dataclass(frozen=True)
class PositionBin:
    """Means over the predictions at some positions of the windows.

    The position of a prediction is the index of the predicted token in its window; BOS has index 0. It equals the
    number of tokens that the model has read.

    Attributes:
        first: first position.
        last: last position, which belongs to the bin.
        tokens: counted predictions.
        nll: mean negative log-likelihood, in nats per token.
        nll_difference: ``nll`` less the baseline's, or None.
        kl: mean KL(baseline ‖ model), in nats per token, or None.
        kl_stderr: standard error of ``kl`` over windows; None for a single window.
    """

    first: int
    last: int
    tokens: int
    nll: float
    nll_difference: float | None
    kl: float | None
    kl_stderr: float | None


class Scores:
    """Sums over counted predictions, in float64.

    Attributes:
        sums: [windows, bins, quantities]; bin b holds the positions from 2**b to 2**(b + 1) - 1.
        counts: predictions [windows, bins].
    """

    def __init__(self, windows: int, size: int) -> None:
        self.size = size
        bins = (size - 1).bit_length()
        self.sums = torch.zeros(windows, bins, len(QUANTITIES), dtype=torch.float64)
        self.counts = torch.zeros(windows, bins, dtype=torch.float64)

    def add(self, first: int, position: int, values: Tensor) -> None:
        """Add consecutive predictions of consecutive windows.

        Args:
            first: index of the first window.
            position: position of the first prediction.
            values: the quantities of each prediction [windows, predictions, quantities], or only the first of them.
        """
        last, length = first + values.shape[0], values.shape[1]
        edges = 2 ** torch.arange(self.counts.shape[1])
        bins = torch.bucketize(torch.arange(position, position + length), edges, right=True) - 1
        self.sums[first:last, :, : values.shape[2]].index_add_(1, bins, values.to("cpu", torch.float64))
        self.counts[first:last] += torch.bincount(bins, minlength=len(edges))

    def stderr(self, name: str) -> float | None:
        """Return the standard error of one of ``MEANS`` over all predictions; None for a single window."""
        return standard_error(self._column(name).sum(1), self.counts.sum(1))

    def positions(self, *, compared: bool) -> list[PositionBin]:
        """Return the bins that hold predictions; ``compared``: whether there is a baseline."""
        means = {name: (self._column(name).sum(0) / self.counts.sum(0)).tolist() for name in MEANS}
        return [
            PositionBin(
                first=2**b,
                last=min(2 ** (b + 1), self.size) - 1,
                tokens=int(count),
                nll=means["nll"][b],
                nll_difference=means["nll_difference"][b] if compared else None,
                kl=means["kl"][b] if compared else None,
                kl_stderr=standard_error(self._column("kl")[:, b], self.counts[:, b]) if compared else None,
            )
            for b, count in enumerate(self.counts.sum(0).tolist())
            if count
        ]

    def _column(self, name: str) -> Tensor:
        """Return the sums of one of ``MEANS`` [windows, bins]."""
        if name == "nll_difference":
            return self._column("nll") - self._column("baseline_nll")
        return self.sums[:, :, QUANTITIES.index(name)]


def standard_error(sums: Tensor, counts: Tensor) -> float | None:
    """Return the standard error of the mean ``sums.sum() / counts.sum()``, with windows as the sampling unit.

    With equal counts, this is the standard deviation of the windows' means over the root of their number. Otherwise it
    is the linearised standard error of a ratio (Cochran, Sampling Techniques, 1977, section 6.3).

    Args:
        sums: sum of the predictions' values in each window [windows].
        counts: predictions in each window [windows]. Windows without predictions are left out.

    Returns:
        The standard error, or None for fewer than 2 windows.
    """
    windows = int((counts > 0).sum())
    if windows < 2:
        return None
    deviations = sums - counts * (sums.sum() / counts.sum())
    return math.sqrt(windows / (windows - 1) * float(deviations.square().sum())) / float(counts.sum())


def flat_means(values: Mapping[str, float], errors: Mapping[str, float | None]) -> dict[str, Any]:
    """Return means with their standard errors, and the perplexities that follow from them, as one flat dictionary.

    Args:
        values: means by name, of ``MEANS``. Missing ones become None.
        errors: standard errors by the same names.

    Returns:
        NAME and NAME_stderr for ``MEANS``, ``perplexity`` and ``baseline_perplexity``.
    """
    flat: dict[str, Any] = {}
    for name in MEANS:
        flat |= {name: values.get(name), f"{name}_stderr": errors.get(name)}
    for prefix in ("", "baseline_"):
        nll, error = flat[f"{prefix}nll"], flat[f"{prefix}nll_stderr"]
        perplexity = None if nll is None else _exp(nll)
        # Delta method: the derivative of exp is exp.
        by_delta = None if perplexity is None or error is None else perplexity * error
        flat |= {f"{prefix}perplexity": perplexity, f"{prefix}perplexity_stderr": by_delta}
    return flat


def mean_over_texts(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean over texts of equal weight, as ``flat_means`` does.

    The mean of the perplexities is exp of the mean nll: their geometric mean. Texts are independent, so the squares of
    their standard errors add up.

    Args:
        results: the results of ``flat_means`` for each text.
    """
    values = {
        name: math.fsum(r[name] for r in results) / len(results) for name in MEANS if results[0][name] is not None
    }
    errors: dict[str, float | None] = {}
    for name in values:
        found = [result[f"{name}_stderr"] for result in results]
        errors[name] = None if None in found else math.hypot(*found) / len(results)
    return flat_means(values, errors)


def _exp(nll: float) -> float:
    """Return exp(nll), or infinity where math.exp would raise: a broken model must also give a result."""
    return math.exp(nll) if nll < 700 else math.inf
