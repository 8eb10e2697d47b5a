"""Refusal of float16 for latents that float16 cannot represent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transmla.errors import TransmlaError

# Ratio of latent rows to rotary rows below which the latent's norm is an identity. Rows of an identity norm are smaller
# by its scale, 2^-13 or less (core/norm_identity.py); rows of an ordinary norm are about as large as rotary rows.
SMALL = 2.0**-10
# The projection whose first rows make the latent, and whose other rows make the rotary key; and the latent's norm.
PROJECTION, NORM = "kv_a_proj_with_mqa", "kv_a_layernorm"


def refuse_underflow(layer: Any, dtype: torch.dtype | None = None) -> None:
    """Check that the latents before the norms of an MLA ``layer`` do not underflow.

    Weights that cannot be read, such as quantised or offloaded ones, are not checked.

    Args:
        layer: an MLA attention module.
        dtype: precision of the computation; None for the dtype of the weights.

    Raises:
        TransmlaError: if ``dtype`` is float16 and a norm is an identity, whose latents are too small for it.
    """
    rank = getattr(getattr(getattr(layer, NORM, None), "weight", None), "shape", (0,))[0]
    weight = getattr(getattr(layer, PROJECTION, None), "weight", None)
    if not rank or not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return
    if (dtype or weight.dtype) != torch.float16:
        return
    latent, rotary = (part.detach().double().square().mean() for part in (weight[:rank], weight[rank:]))
    if latent < SMALL**2 * rotary:
        raise TransmlaError(
            f"this export cannot compute in float16: a latent of layer {layer.layer_idx} underflows in float16",
            limit="its norm is an identity on latents near 1e-6, and float16 loses precision below 6e-5",
            remedy="use bfloat16 or float32, for the weights (dtype=…) and under autocast, or convert with "
            "--format transmla, which has no such norm",
        )


def precision(layer: Any) -> torch.dtype | None:
    """Return the precision in which an MLA ``layer`` makes its latents: that of autocast, or of its weights.

    The result is None if the weights cannot be read, such as offloaded and some quantised ones.
    """
    weight = getattr(getattr(layer, PROJECTION, None), "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        return None
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
