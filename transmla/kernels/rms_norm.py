"""RMSNorm in one Triton kernel, rounded as transformers' models round it. Their eager code launches eight kernels."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch has no Triton
    triton = None

# Largest width of a row. One program holds a whole row in registers.
MAX_WIDTH = 16384

if triton is not None:

    @triton.jit
    def _normalise(x, weight, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        """Normalise one row."""
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        inside = column < WIDTH
        values = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values) / WIDTH + eps)
        # transformers rounds before it multiplies by the weight.
        rounded = (values * scale).to(x.dtype.element_ty).to(tl.float32)
        weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * WIDTH + column, (rounded * weights).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide rows by their root mean square and multiply them by a weight.

    Args:
        x: rows [..., D].
        weight: [D], in the dtype of ``x``.
        eps: added to the mean square.

    Returns:
        [..., D], in the dtype of ``x``.
    """
    rows, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(rows)
    block = triton.next_power_of_2(width)
    count = rows.numel() // width
    if count:
        _normalise[(count,)](rows, weight, out, eps, WIDTH=width, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return out
