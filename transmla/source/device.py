"""Choose the device of a run, and tell whether it is fast in bfloat16."""

from __future__ import annotations

import torch

from transmla.boundary import reason
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
    except RuntimeError as error:
        named = f"write cuda:{name}" if name.isdecimal() else "correct --device"
        limit, remedy = "a device is auto, cpu, cuda, cuda:1, …", f"{named}, or leave it out"
        raise TransmlaError(f"device '{name}' is not usable", limit=limit, remedy=remedy) from error
    if device.type == "cpu":
        return torch.device("cpu")  # there is only one, and no library asks for its number
    lack = _lack(device)
    if lack is not None:
        raise TransmlaError(f"device '{name}' is not usable", limit=lack, remedy="use --device cpu, or leave it out")
    return device


def _lack(device: torch.device) -> str | None:
    """Return why nothing can be computed on ``device``; None if something can."""
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            built = torch.version.cuda or torch.version.hip
            return "PyTorch finds no GPU" if built else "this PyTorch is a build for CPUs"
        if (device.index or 0) >= count:
            return f"the GPUs of this machine are {', '.join(f'cuda:{i}' for i in range(count))}"
    if device.type == "mps" and not torch.backends.mps.is_available():
        return "PyTorch finds no GPU of a Mac"
    if device.type == "meta":
        return "its tensors hold no values"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        served = device.type in ("cuda", "mps")
        return reason(error) if served else "this PyTorch cannot use such devices"
    return None


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices faster than float32 matrices."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return True
