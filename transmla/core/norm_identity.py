"""Scales that make the latent's RMSNorm an identity.

Every MLA runtime normalises the latent: w ⊙ c / sqrt(mean(c²) + eps). Scale the latent down by s, so that mean((s·c)²)
stays far below eps for every token. The root is then the constant sqrt(eps), and the weight w = sqrt(eps)/s undoes the
scale. The norm is an identity, and the cached latent keeps its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# mean((s·c)²)/eps of the largest calibration token. The relative change of the root is half of this. Chosen so that
# even a token with 1,000 times this energy changes the root by 0.05 % only, an eighth of bfloat16's spacing.
HEADROOM = 2.0**-20


@dataclass(frozen=True)
class NormIdentity:
    """Three scalars that together make the norm an identity.

    Attributes:
        scale: factor on the rows of the latent's down-projection.
        weight: the weight of the norm, the same for every channel.
        readout: factor on the up-projection (``kv_b_proj``).
    """

    scale: float
    weight: float
    readout: float


def norm_identity(mean_square: float, max_square: float, eps: float, dtype: torch.dtype) -> NormIdentity:
    """Return the scales that make an RMSNorm an identity on latents of the given size.

    The scale is a power of two, so the rows lose no bits. The weight is rounded to ``dtype`` here, and ``readout``
    corrects for the rounding, so the product is exact in the precision of the export. A latent that is zero or not
    finite keeps ``scale`` and ``weight`` 1.

    Args:
        mean_square: mean of mean(c²) over the calibration tokens.
        max_square: largest mean(c²) of a calibration token.
        eps: the eps of the norm.
        dtype: the dtype of the export.
    """
    if max_square <= 0 or not math.isfinite(max_square):
        return NormIdentity(1.0, 1.0, math.sqrt(eps))
    scale = 2.0 ** math.floor(0.5 * math.log2(HEADROOM * eps / max_square))
    ideal = math.sqrt(eps + mean_square * scale**2) / scale
    weight = torch.tensor(ideal, dtype=torch.float64).to(dtype).item()
    return NormIdentity(scale, weight, ideal / weight)
