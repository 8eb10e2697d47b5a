"""Queries, keys and values of all heads, written where the attention reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from transmla.kernels.rows import Rows
from transmla.modeling.modeling_transmla import PerHead
from transmla.runtime.absorbed import reads_weight


def can_expand(module: Any, rows: Rows) -> bool:
    """Return whether ``expand`` gives what the family's ``expand_kv`` gives for ``rows``, up to rounding."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(rows.k_pe.device.type)
        and (rows.scale is not None or rows.kv_c.dtype == rows.k_pe.dtype)
        # On CPUs, oneDNN computes products in half precision, and copies outputs that are not contiguous.
        and (rows.k_pe.is_cuda or rows.k_pe.element_size() >= 4)
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
    d_n, d_r, d_v = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
    kv_c, k_pe = rows.full()
    weight = module.kv_b_proj.weight.unflatten(0, (-1, d_n + d_v))
    buffer = kv_c.new_empty(*kv_c.shape[:2], len(weight), d_n + d_r + d_v)
    latents = kv_c.flatten(0, 1).expand(len(weight), -1, -1)
    by_head = buffer.flatten(0, 1).transpose(0, 1)
    torch.bmm(latents, weight[:, :d_n].mT, out=by_head[..., :d_n])
    torch.bmm(latents, weight[:, d_n:].mT, out=by_head[..., d_n + d_r :])
    buffer[..., d_n : d_n + d_r] = k_pe[:, :, None]
    keys, values = buffer.transpose(1, 2).split([d_n + d_r, d_v], -1)
    return keys, values


def may_overwrite(module: Any, query: Tensor) -> bool:
    """Return whether only the attention ``module`` of the transmla format reads its projected ``query``."""
    projection = module.q_proj if module.q_b_proj is None else module.q_b_proj
    return (
        not torch.is_grad_enabled()
        and not query.requires_grad
        and not torch.compiler.is_compiling()
        and type(projection) in (nn.Linear, PerHead)
        and not projection._forward_hooks
        and not _has_any_global_hook()
    )
