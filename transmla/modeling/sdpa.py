"""Choose among PyTorch's kernels for ``scaled_dot_product_attention``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel


def without_cudnn() -> AbstractContextManager[Any]:
    """Return a context in which attention uses PyTorch's flash, memory-efficient and math kernels.

    PyTorch prefers cuDNN's kernels on Hopper and Blackwell GPUs. They have no deterministic backward pass, and the CPU
    plans them anew for every length of a cache, so for every token that a model writes. In profiles of sampling on an
    H200 (torch 2.11, 512 tokens a sample), the calls of attention took 15 to 24 of 22 to 35 seconds.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
