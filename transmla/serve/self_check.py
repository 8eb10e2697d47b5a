"""Compare the logits of a served model with those that its export's signature records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transmla.errors import TransmlaError
from transmla.export.travel import KEY
from transmla.signature.probe import project

# Largest deviation from the signed logits, as a fraction of their size, by precision.
TOLERANCE = {torch.float32: 1e-2}
OTHER_TOLERANCE = 0.5
REMEDY = (
    "run `transmla verify` on the export, or serve it unchecked with "
    """--additional-config '{"transmla_self_check": false}'"""
)


def signed_logits(config: Mapping[str, Any]) -> list[float] | None:
    """Return the projections of the logits that an export's ``config.json`` records; None if it is not signed."""
    signature = (config.get(KEY) or {}).get("signature") or {}
    return signature.get("logits")


def disagreement(decoded: Tensor, prefilled: Tensor, signed: list[float], dtype: torch.dtype) -> str | None:
    """Compare the logits for the seeded tokens with the signed ones.

    Args:
        decoded: logits [T, vocabulary] of the tokens, read one by one.
        prefilled: logits [vocabulary] of the last token, read together with all others.
        signed: projections that the signature records.
        dtype: the model's precision.

    Returns:
        One line that says what differs and what to do; None if the logits agree.
    """
    tolerance = TOLERANCE.get(dtype, OTHER_TOLERANCE)
    worst = max(project(decoded).deviations(signed))
    apart = float((decoded[-1] - prefilled).norm() / decoded[-1].norm())
    for what, deviation in (
        ("the model's logits differ from those signed", worst),
        ("the logits of prefill differ from those of decoding", apart),
    ):
        if not deviation <= tolerance:
            limit = f"deviation {deviation:.1e}, at most {tolerance:.0e} in {str(dtype).removeprefix('torch.')}"
            return str(TransmlaError(what, limit=limit, remedy=REMEDY))
    return None
