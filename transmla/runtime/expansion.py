"""Queries, keys and values of all heads, written where the attention reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from transmla.kernels.rows import Rows
from transmla.modeling.modeling_transmla import PerHead
from transmla.runtime.absorbed import keeps_forward, reads_weight

# Alignment of keys and of values in their buffer that the kernels of a GPU assume, in bytes.
ALIGNED = 16


def may_write() -> bool:
    """Return whether results may be written into given memory: nothing differentiates, compiles or maps the call."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def can_expand(module: Any, rows: Rows) -> bool:
    """Return whether ``expand`` gives what the family's ``expand_kv`` gives for ``rows``, up to rounding."""
    return (
        may_write()
        and not torch.is_autocast_enabled(rows.k_pe.device.type)
        and (rows.scale is not None or rows.kv_c.dtype == rows.k_pe.dtype)
        and _kernels_read(module, rows.k_pe)
        and reads_weight(module.kv_b_proj, rows.k_pe.dtype, rows.k_pe.device)
    )


def expand(module: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    """Expand ``rows`` for all heads.

    The products with W_UK and W_UV are written into one buffer [B, T, H, d_n + d_r + d_v], in rows [key | value].

    Args:
        module: the attention layer.
        rows: the cached rows, for which ``can_expand``.

    Returns:
        Keys [B, H, T, d_n + d_r] and values [B, H, T, d_v], views of the buffer.
    """
    d_n, d_r, d_v = _widths(module)
    kv_c, k_pe = rows.full()
    batch, tokens, rank = kv_c.shape
    weight = module.kv_b_proj.weight.view(-1, d_n + d_v, rank)
    heads = len(weight)
    buffer = kv_c.new_empty(batch * tokens, heads, d_n + d_r + d_v)
    nope, rotary, value = buffer.transpose(0, 1).split_with_sizes([d_n, d_r, d_v], -1)
    latents = kv_c.reshape(1, -1, rank).expand(heads, -1, -1)
    torch.bmm(latents, weight[:, :d_n].mT, out=nope)
    torch.bmm(latents, weight[:, d_n:].mT, out=value)
    rotary.copy_(k_pe.reshape(1, -1, d_r))
    heads_first = buffer.view(batch, tokens, heads, -1).transpose(1, 2)
    keys, values = heads_first.split_with_sizes([d_n + d_r, d_v], -1)
    return keys, values


def rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``rows`` [B, ·, T, d_r], in which (i, i + d_r / 2) are pairs.

    Args:
        rows: rotary parts of queries and keys.
        cos: cosines [B, 1, T, d_r / 2] in float32.
        sin: sines [B, 1, T, d_r / 2] in float32.

    Returns:
        [B, ·, T, d_r] in the dtype of ``rows``.
    """
    wide = rows.float()
    turned = torch.empty_like(wide)
    (real, imaginary), (turned_real, turned_imaginary) = wide.chunk(2, -1), turned.chunk(2, -1)
    torch.mul(real, cos, out=turned_real).addcmul_(imaginary, sin, value=-1)
    torch.mul(imaginary, cos, out=turned_imaginary).addcmul_(real, sin)
    return turned.to(rows.dtype)


def _kernels_read(module: Any, k_pe: Tensor) -> bool:
    """Whether kernels read keys and values of ``module`` from one buffer, for rotary keys ``k_pe``."""
    if k_pe.is_cuda:
        return all(width * k_pe.element_size() % ALIGNED == 0 for width in _widths(module))
    # oneDNN computes products in half precision, and copies outputs that are not contiguous.
    return k_pe.element_size() >= 4


def _widths(module: Any) -> tuple[int, int, int]:
    """d_n, d_r and d_v of ``module``."""
    return module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim


def may_overwrite(module: Any, query: Tensor) -> bool:
    """Return whether only the attention ``module`` of the transmla format reads its projected ``query``."""
    projection = module.q_proj if module.q_b_proj is None else module.q_b_proj
    return (
        may_write()
        and not query.requires_grad
        and type(projection) in (nn.Linear, PerHead)
        and not projection._forward_hooks
        and not _has_any_global_hook()
        and keeps_forward(projection)
    )
