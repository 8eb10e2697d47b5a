"""Choose among PyTorch's kernels for ``scaled_dot_product_attention``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

# Prompts from this length on use cuDNN for heads of two widths, in tokens. cuDNN plans its kernels once for each
# length, which took 30 to 47 ms in the profiles below. By the number of products, it saves as much from about 10,000
# tokens on, and half from 8,192 on, for 32 layers of 32 heads.
LONG = 8192
# Older versions of cuDNN give wrong results for some lengths (pytorch issue 169849).
SOUND = 91501


def without_cudnn() -> AbstractContextManager[Any]:
    """Return a context in which attention uses PyTorch's flash, memory-efficient and math kernels.

    PyTorch prefers cuDNN's kernels on Hopper and Blackwell GPUs. They have no deterministic backward pass, and the CPU
    plans them anew for every length of a cache, so for every token that a model writes. In profiles of sampling on an
    H200 (torch 2.11, 512 tokens a sample), the calls of attention took 15 to 24 of 22 to 35 seconds.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def cudnn_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether cuDNN attends causally to a long prompt whose queries and keys are wider than its values.

    PyTorch's other fast kernel, flash attention, needs values that are padded to the width of the keys: a third of its
    products with values are then products with zeros, for widths of 192 and 128. PyTorch decides which widths, devices
    and versions of cuDNN are supported.

    Args:
        query: [B, H, T, d_n + d_r].
        key: [B, H, T, d_n + d_r].
        value: [B, H, T, d_v].
    """
    return (
        query.is_cuda
        and query.shape[2] == key.shape[2] >= LONG
        and query.shape[-1] != value.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and (torch.backends.cudnn.version() or 0) >= SOUND
        and bool(can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, True, False)))
    )


def only_cudnn() -> AbstractContextManager[Any]:
    """Return a context in which attention uses cuDNN's kernels."""
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
