"""Refuse float16 for models whose latent norm is an identity, as in native exports (``core/norm_identity.py``).

Such latents are scaled down until their mean square is far below the norm's eps. float16 rounds values of this size to
a few steps, or to zero, and the model answers nonsense without an error.
"""

from __future__ import annotations

from typing import Any

import torch

from transmla.errors import TransmlaError

# Projections whose first rows produce a latent, and the norm of that latent.
_LATENTS = (("kv_a_proj_with_mqa", "kv_a_layernorm"), ("q_a_proj", "q_a_layernorm"))
# Mean squared norm of the rows that produce a latent, below which the norm cannot be a real one: the eps of all
# DeepSeek models. Trained models have about 1, native exports about 1e-12.
_EPS = 1e-6


def refuse_float16(layer: Any, dtype: torch.dtype) -> None:
    """Check that an MLA ``layer`` can compute in ``dtype``.

    Raises:
        TransmlaError: for float16, if a latent norm of the layer is an identity.
    """
    if dtype == torch.float16 and any(_is_identity(layer, *names) for names in _LATENTS):
        raise TransmlaError(
            "this export cannot compute in float16",
            limit="its latent norm is an identity on values that float16 rounds to zero",
            remedy="use bfloat16 or float32, or convert with --format transmla, which has no such norm",
        )


def refuse_float16_autocast(layer: Any, device: torch.device) -> None:
    """Check that an MLA ``layer`` can compute in the precision to which ``torch.autocast`` is set, if it is on.

    Raises:
        TransmlaError: as ``refuse_float16`` does.
    """
    if torch.is_autocast_enabled(device.type):
        refuse_float16(layer, torch.get_autocast_dtype(device.type))


@torch.no_grad()
def _is_identity(layer: Any, projection: str, norm: str) -> bool:
    """Return whether the norm of one latent is an identity; False if its weights cannot be read, as when offloaded."""
    width = getattr(getattr(getattr(layer, norm, None), "weight", None), "shape", (0,))[0]
    weight: Any = getattr(getattr(layer, projection, None), "weight", None)
    if not width or type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.is_meta:
        return False
    return bool(weight.is_floating_point()) and float(weight[:width].float().square().sum(-1).mean()) < _EPS
