"""The device that a run uses, and whether it is fast in bfloat16."""

from __future__ import annotations

import torch

from transmla.errors import TransmlaError


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TransmlaError(
            f"device '{name}' is not usable", limit=str(error).splitlines()[0], remedy="use --device cpu"
        ) from error
    return device


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return True
