"""Refusal of float16 for latents that float16 cannot represent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transmla.errors import TransmlaError

# Smallest float16 number with full precision, 6.1e-5. The latents of an identity norm are below 1e-5
# (core/norm_identity.py), and so are the weights that make them.
SMALLEST = torch.finfo(torch.float16).tiny


def refuse_underflow(layer: Any, dtype: torch.dtype | None = None) -> None:
    """Check that the latents before the norm of an MLA ``layer`` do not underflow.

    Args:
        layer: an MLA attention module.
        dtype: precision of the computation; None for the dtype of the weights.

    Raises:
        TransmlaError: if ``dtype`` is float16 and the norm is an identity, whose latents are too small for it.
    """
    projection, norm = (getattr(layer, name, None) for name in ("kv_a_proj_with_mqa", "kv_a_layernorm"))
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return
    if (dtype or weight.dtype) != torch.float16 or isinstance(norm, nn.Identity):
        return
    size = weight[: layer.kv_lora_rank].detach().float().square().mean().sqrt()
    if size < SMALLEST:
        raise TransmlaError(
            f"the latent of layer {layer.layer_idx} underflows in float16",
            limit="its norm is an identity on latents near 1e-6, and float16 loses precision below 6e-5",
            remedy="use bfloat16 or float32, for the weights (dtype=…) and under autocast",
        )
