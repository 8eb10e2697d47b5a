"""Compare the logits of a served model with those that its export's signature records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.errors import TransmlaError
from transmla.export.travel import KEY
from transmla.signature.compare import rounded_tolerances
from transmla.signature.probe import project_logits

# Largest deviation from the signed logits in float32, as a fraction of their size.
FLOAT32_TOLERANCE = 1e-2


@dataclass(frozen=True)
class SignedLogits:
    """What an export records of its logits.

    Attributes:
        projections: their projections, one for each group of tokens.
        rounding: their relative change if the model runs in bfloat16, for each group.
    """

    projections: list[float]
    rounding: list[float]

    def tolerances(self, dtype: torch.dtype) -> list[float]:
        """Return the largest deviation of each group from its projection, for a model in ``dtype``."""
        if dtype == torch.float32:
            return [FLOAT32_TOLERANCE] * len(self.rounding)
        return rounded_tolerances(self.rounding)


@dataclass(frozen=True)
class Comparison:
    """Result of the comparison: whether the logits agree, and the deviations in one line."""

    passed: bool
    detail: str


def signed_logits(config: Mapping[str, Any]) -> SignedLogits | None:
    """Return what an export's ``config.json`` records of its logits; None if that is not signed."""
    signature = (config.get(KEY) or {}).get("signature") or {}
    projections, rounding = signature.get("logits"), signature.get("rounding")
    return SignedLogits(projections, rounding) if projections and rounding else None


def compare_served(decoded: Tensor, prefilled: Tensor, signed: SignedLogits, dtype: torch.dtype) -> Comparison:
    """Compare the logits for the seeded tokens with the signed ones.

    Args:
        decoded: logits [T, vocabulary] of the tokens, read one by one.
        prefilled: logits [vocabulary] of the last token, read together with all others.
        signed: what the export records of its logits.
        dtype: the model's precision.
    """
    tolerances, name = signed.tolerances(dtype), str(dtype).removeprefix("torch.")
    deviations = project_logits(decoded).deviations(signed.projections)
    apart = float((decoded[-1] - prefilled).norm() / decoded[-1].norm())
    pairs = [*zip(deviations, tolerances, strict=False), (apart, max(tolerances))]
    # The pair that is furthest beyond its tolerance; NaN compares as the largest.
    worst, limit = max(pairs, key=lambda pair: float("inf") if math.isnan(pair[0]) else pair[0] / pair[1])
    return Comparison(
        len(deviations) == len(tolerances) and worst <= limit,
        f"decoding deviates by {max(deviations):.1e} from the signature, and prefill by {apart:.1e} from decoding; "
        f"the worst is {worst:.1e}, at most {limit:.1e} in {name}",
    )


def refusal(comparison: Comparison, runtime: str, unchecked: str) -> str:
    """Return why a model whose ``comparison`` failed is not served, and what to do, in one line.

    Args:
        comparison: the comparison that failed.
        runtime: the runtime's name.
        unchecked: the runtime's option that turns the comparison off.
    """
    what = f"{runtime}'s logits differ from those that the export records"
    remedy = f"run `transmla verify` on the export, or serve it unchecked with {unchecked}"
    return str(TransmlaError(what, limit=comparison.detail, remedy=remedy))
