"""The scale of a native export's latents: taken out of an attention for healing, and put back for the export.

A native export scales its latents down until their norm is a constant (``core/norm_identity.py``). Rows of one tensor
then differ in size by many orders of magnitude, which no optimiser's step fits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transmla.core.norm_identity import norm_identity
from transmla.formats.native_layout import RMS_NORM_EPS

# (projection, norm, reader) of the latents that a layer may have.
LATENTS = [("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"), ("q_a_proj", "q_a_layernorm", "q_b_proj")]


class LatentMeter(nn.Module):
    """Stands where a latent norm stood: passes latents on, and measures their size while ``watching``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.watching = False
        self.reset()

    def reset(self) -> None:
        """Forget all measurements."""
        self.total, self.count, self.largest = 0.0, 0, 0.0

    def forward(self, latent: Tensor) -> Tensor:
        """Return ``latent`` [..., r] unchanged."""
        if self.watching:
            squares = latent.detach().float().square().mean(-1)
            self.total += float(squares.sum())
            self.count += squares.numel()
            self.largest = max(self.largest, float(squares.max()))
        return latent


@torch.no_grad()
def to_natural(attention: Any) -> None:
    """Fold scale and norm out of the latents of one ``attention`` (float32), in place; its output does not change."""
    for projection, norm, _ in LATENTS:
        if getattr(attention, norm, None) is not None:
            weight = getattr(attention, norm).weight
            rows = getattr(attention, projection).weight[: len(weight)]
            rows.mul_((weight / RMS_NORM_EPS**0.5)[:, None])
            setattr(attention, norm, LatentMeter(len(weight)))


@torch.no_grad()
def from_natural(name: str, attention: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Scale the latents in ``weights`` by the sizes that ``attention`` measured, and add their norms, in place.

    ``name`` is the prefix of the attention's tensors; layers that ``weights`` does not hold are skipped.
    """
    for projection, norm, reader in LATENTS:
        meter = getattr(attention, norm, None)
        if not isinstance(meter, LatentMeter) or f"{name}.{projection}.weight" not in weights:
            continue
        identity = norm_identity(meter.total / max(meter.count, 1), meter.largest, RMS_NORM_EPS, dtype)
        rows = weights[f"{name}.{projection}.weight"].double()
        rows = torch.cat([rows[: meter.width] * identity.scale, rows[meter.width :]])
        weights[f"{name}.{projection}.weight"] = rows
        weights[f"{name}.{norm}.weight"] = torch.full((meter.width,), identity.weight, dtype=torch.float64)
        weights[f"{name}.{reader}.weight"] = weights[f"{name}.{reader}.weight"].double() * identity.readout
