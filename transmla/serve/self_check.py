"""Compare the logits of a served model with those that its export's signature records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.errors import TransmlaError
from transmla.export.travel import KEY
from transmla.signature.probe import project

# Largest deviation from the signed logits, as a fraction of their size, by precision.
TOLERANCE = {torch.float32: 1e-2}
OTHER_TOLERANCE = 0.5


@dataclass(frozen=True)
class Comparison:
    """Result of the comparison: whether the logits agree, and the deviations in one line."""

    passed: bool
    detail: str


def signed_logits(config: Mapping[str, Any]) -> list[float] | None:
    """Return the projections of the logits that an export's ``config.json`` records; None if it is not signed."""
    signature = (config.get(KEY) or {}).get("signature") or {}
    return signature.get("logits")


def compare_served(decoded: Tensor, prefilled: Tensor, signed: list[float], dtype: torch.dtype) -> Comparison:
    """Compare the logits for the seeded tokens with the signed ones.

    Args:
        decoded: logits [T, vocabulary] of the tokens, read one by one.
        prefilled: logits [vocabulary] of the last token, read together with all others.
        signed: projections that the signature records.
        dtype: the model's precision.
    """
    tolerance, name = TOLERANCE.get(dtype, OTHER_TOLERANCE), str(dtype).removeprefix("torch.")
    deviations = project(decoded).deviations(signed)
    apart = float((decoded[-1] - prefilled).norm() / decoded[-1].norm())
    return Comparison(
        all(deviation <= tolerance for deviation in (*deviations, apart)),
        f"decoding deviates by {max(deviations):.1e} from the signature, and prefill by {apart:.1e} from decoding; at "
        f"most {tolerance:.0e} in {name}",
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
