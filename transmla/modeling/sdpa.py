"""Choose among PyTorch's kernels for ``scaled_dot_product_attention``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def without_cudnn() -> AbstractContextManager[Any]:
    """Return a context in which attention uses PyTorch's flash, memory-efficient and math kernels.

    PyTorch prefers cuDNN's kernels on Hopper and Blackwell GPUs. They have no deterministic backward pass, and the CPU
    plans them anew for every length of a cache, so for every token that a model writes. In profiles of sampling on an
    H200 (torch 2.11, 512 tokens a sample), the calls of attention took 15 to 24 of 22 to 35 seconds.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def takes_two_widths(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Return whether PyTorch attends to values narrower than keys best without padding them.

    Flash attention needs values that are padded to the width of the keys. For widths of 192 and 128, a third of its
    products with values are then products with zeros. cuDNN's kernels need no padding: for 32 heads on an H100, they
    took 4.33 instead of 4.72 ms for 16,384 tokens, and 17.1 instead of 20.0 ms for 32,768. Flash attention took 10.6
    and 39.5 ms (torch 2.11).

    The choice among the kernels stays PyTorch's. cuDNN plans its kernels once for each new length, which takes about
    50 ms; where PyTorch prefers cuDNN, it would plan for padded values and for the source as well.

    Args:
        query: [B, H, n, d_n + d_r].
        key: [B, H, T, d_n + d_r].
        value: [B, H, T, d_v].
        mask: the attention mask, or None (causal), as for SDPA.
    """
    if not query.is_cuda or key.shape[-1] == value.shape[-1]:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    chosen = choice(query, key, value, mask)
    # Flash attention takes no mask, so padding would not help to get it.
    return chosen == SDPBackend.CUDNN_ATTENTION or (mask is not None and chosen == SDPBackend.EFFICIENT_ATTENTION)


def choice(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> SDPBackend:
    """Return the kernel that PyTorch chooses for these heads; arguments as ``takes_two_widths``."""
    causal, new = mask is None and query.shape[2] > 1, query.shape[2]
    if causal:
        # transformers drops the unwritten rows of a static cache, which is_causal would align otherwise.
        key, value = key[:, :, :new], value[:, :, :new]
    return SDPBackend(torch._fused_sdp_choice(query, key, value, mask, 0.0, causal))
