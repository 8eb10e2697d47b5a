"""Remove the latent scale of a native export for healing, and restore the scale for saving.

A native export scales its latents down until their RMSNorm divides by a constant (``core/norm_identity.py``). Rows of
one weight then differ in size by orders of magnitude, so no single learning rate fits all rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transmla.core.norm_identity import norm_identity
from transmla.formats.native_layout import RMS_NORM_EPS

# (projection, norm, reader) of each latent: the key/value latent, and the query latent where queries are compressed.
LATENTS = [("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"), ("q_a_proj", "q_a_layernorm", "q_b_proj")]


class LatentMeter(nn.Module):
    """Module that replaces a latent norm: returns latents unchanged, and measures their size while ``watching``.

    Attributes:
        width: width r of the latent.
        watching: whether ``forward`` measures.
        total, count, largest: sum, number and maximum of mean(c²) over the measured tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.watching = False
        self.reset()

    def reset(self) -> None:
        """Clear all measurements."""
        self.total, self.count, self.largest = 0.0, 0, 0.0

    def forward(self, latent: Tensor) -> Tensor:
        """Return ``latent`` [..., r] unchanged; while ``watching``, add its tokens to the measurements."""
        if self.watching:
            squares = latent.detach().float().square().mean(-1)
            self.total += float(squares.sum())
            self.count += squares.numel()
            self.largest = max(self.largest, float(squares.max()))
        return latent


def measure(attention: nn.Module, *, watching: bool) -> None:
    """Start (``watching``) or stop measuring the latents of one natural ``attention``. A start clears the past."""
    for module in attention.modules():
        if isinstance(module, LatentMeter):
            module.watching = watching
            if watching:
                module.reset()


@torch.no_grad()
def to_natural(attention: Any) -> None:
    """Fold the latent norms of one ``attention`` (float32) into its projections, in place; its output does not change.

    Each norm is replaced by a ``LatentMeter``.
    """
    for projection, norm, _ in LATENTS:
        if getattr(attention, norm, None) is not None:
            weight = getattr(attention, norm).weight
            rows = getattr(attention, projection).weight[: len(weight)]
            rows.mul_((weight / RMS_NORM_EPS**0.5)[:, None])
            setattr(attention, norm, LatentMeter(len(weight)))


@torch.no_grad()
def from_natural(name: str, attention: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Scale the latents in ``weights`` down again, and add their norms, in place.

    Args:
        name: prefix of the attention's tensors; nothing happens if ``weights`` does not hold them.
        attention: the attention module, whose ``LatentMeter`` modules measured the latents.
        weights: the tensors to be saved, by name.
        dtype: the export's precision.
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
