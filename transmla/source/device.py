"""Choose the device of a run, and tell whether it is fast in bfloat16."""

from __future__ import annotations

import torch

from transmla.errors import TransmlaError


def pick_device(name: str) -> torch.device:
    """Return the device with a given name. ``auto`` means the first GPU, or the CPU if there is no GPU.

    Raises:
        TransmlaError: if the device does not exist or cannot be used.
    """
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
    """Return whether the device multiplies bfloat16 matrices faster than float32 matrices."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return True
