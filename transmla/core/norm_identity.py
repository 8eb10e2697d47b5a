"""Making a latent RMSNorm do nothing.

Every MLA runtime normalises the latent: w ⊙ c / sqrt(mean(c²) + eps). If the latent is scaled down by s so
that mean((s·c)²) stays far below eps for every token, the root is the constant sqrt(eps) and the weight
w = sqrt(eps)/s undoes the scale: the norm is an identity and the cached latent keeps its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# mean((s·c)²)/eps of the largest calibration token: the root then varies by half of this, relatively, and for a
# token with 1,000 times that energy by 0.05 %, an eighth of bfloat16's spacing.
HEADROOM = 2.0**-20


@dataclass(frozen=True)
class NormIdentity:
    """``scale`` multiplies the latent's rows, ``weight`` is the norm's weight, ``readout`` multiplies kv_b_proj."""

    scale: float
    weight: float
    readout: float


def norm_identity(mean_square: float, max_square: float, eps: float, dtype: torch.dtype) -> NormIdentity:
    """Scales that neutralise an RMSNorm of ``eps`` over latents of this mean and largest mean(c²).

    The scale is a power of two, so rows lose no bits; the weight is rounded to ``dtype`` here, and the
    rounding folded into ``readout``, so the product is exact in the exported precision.
    """
    if max_square <= 0 or not math.isfinite(max_square):
        return NormIdentity(1.0, 1.0, math.sqrt(eps))
    scale = 2.0 ** math.floor(0.5 * math.log2(HEADROOM * eps / max_square))
    ideal = math.sqrt(eps + mean_square * scale**2) / scale
    weight = torch.tensor(ideal, dtype=torch.float64).to(dtype).item()
    return NormIdentity(scale, weight, ideal / weight)
