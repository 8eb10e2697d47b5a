"""Remove the scales of a native export's latents and inputs for healing, and restore them for saving.

A native export scales its latents down until their RMSNorm divides by a constant (``core/norm_identity.py``). Rows of
one weight then differ in size by orders of magnitude, so no single learning rate fits all rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from transmla.core.norm_identity import norm_identity
from transmla.formats.native_layout import INPUT_PROJECTIONS, RMS_NORM_EPS

# (projection, norm, reader) of each latent: the key/value latent, and the query latent where queries are compressed.
LATENTS = [("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"), ("q_a_proj", "q_a_layernorm", "q_b_proj")]


class LatentMeter(nn.Module):
    """Module that replaces a latent norm: returns latents unchanged, and measures their size while ``watching``.

    Attributes:
        width: width r of the latent.
        watching: whether ``forward`` measures.
        input_scale: factor that was taken from the input norm's weight, and returns to it in the export.
        total, count, largest: sum, number and maximum of mean(c²) over the measured tokens.
    """

    def __init__(self, width: int, input_scale: float) -> None:
        super().__init__()
        self.width = width
        self.input_scale = input_scale
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
def to_natural(attention: Any, input_norm: Any) -> None:
    """Fold the latent norms of one ``attention`` (float32) into its projections, in place; its output does not change.

    Each norm is replaced by a ``LatentMeter``. The weight of ``input_norm`` gets an ordinary size: it is divided by a
    power of two, and the projections that read it are multiplied by it.
    """
    size = float(input_norm.weight.square().mean().sqrt())
    input_scale = 2.0 ** round(math.log2(size)) if size > 0 and math.isfinite(size) else 1.0
    input_norm.weight.div_(input_scale)
    for name in INPUT_PROJECTIONS:
        if (reader := getattr(attention, name.removesuffix(".weight"), None)) is not None:
            reader.weight.mul_(input_scale)
    for projection, norm, _ in LATENTS:
        if getattr(attention, norm, None) is not None:
            weight = getattr(attention, norm).weight
            rows = getattr(attention, projection).weight[: len(weight)]
            rows.mul_((weight / RMS_NORM_EPS**0.5)[:, None])
            setattr(attention, norm, LatentMeter(len(weight), input_scale))


@torch.no_grad()
def from_natural(name: str, attention: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Scale the latents and the input in ``weights`` down again, and add the latents' norms, in place.

    Args:
        name: prefix of the attention's tensors, which stay as they are if ``weights`` does not hold them.
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
    meter = attention.kv_a_layernorm
    if isinstance(meter, LatentMeter):
        input_norm = f"{name.rpartition('.')[0]}.input_layernorm.weight"
        if input_norm in weights:
            weights[input_norm] = weights[input_norm].double() * meter.input_scale
        for projection in INPUT_PROJECTIONS:
            if f"{name}.{projection}" in weights:
                weights[f"{name}.{projection}"] = weights[f"{name}.{projection}"].double() / meter.input_scale
