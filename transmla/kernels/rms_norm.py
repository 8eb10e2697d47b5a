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
    def _normalise(x, weight, out, stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        """Normalise one row."""
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        inside = column < WIDTH
        values = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
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
        [..., D], in the dtype of ``x``, contiguous.
    """
    width = x.shape[-1]
    # Rows may lie apart, as the latents of a projection [latent | rotary key] do.
    rows = x.reshape(-1, width)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    if len(rows):
        warps = min(16, max(1, block // 512))
        _normalise[(len(rows),)](rows, weight, out, rows.stride(0), eps, WIDTH=width, BLOCK=block, num_warps=warps)
    return out
