"""The absorbed form: attend to latents with W_UK folded into the queries and W_UV into the output.

DeepSeek-V2, arXiv 2405.04434, section 2.1.2. The weight of ``kv_b_proj`` is read directly, so ``can_absorb`` first
makes sure that the product with it is all that the projection computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from transmla.kernels.rows import Rows, Scores
from transmla.runtime.forms import expanding_is_cheaper
from transmla.runtime.head_widths import one_width
from transmla.runtime.prefix_cache import PrefixLayer, attend, merge
from transmla.runtime.split_cache import SplitLayer, merge_shares

# Largest number of new tokens in one kernel call. A kernel is compiled for each number of new tokens.
PIECE = 32
# Classes of weights that hold their values themselves. Quantised and sharded weights are other subclasses of Tensor.
PLAIN_WEIGHTS = (nn.Parameter, Tensor)


def can_absorb(module: Any, query: Tensor, rows: Rows, mask: Tensor | None, extras: dict[str, Any]) -> bool:
    """Return whether the absorbed form gives the same result as the expanded form.

    Args:
        module: the attention layer.
        query: [B, H, n, d_n + d_r].
        rows: the cached rows.
        mask: the attention mask, or None.
        extras: the other arguments of the attention function.
    """
    if extras.get("position_bias") is not None or extras["dropout"]:
        return False
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
        return False
    if torch.is_grad_enabled() and (query.requires_grad or rows.kv_c.requires_grad):
        return False
    # Under autocast, kernels would get queries and rows of different dtypes.
    if torch.is_autocast_enabled(query.device.type) or rows.k_pe.dtype != query.dtype:
        return False
    return reads_weight(module.kv_b_proj, query.dtype, query.device)


def reads_weight(projection: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether ``projection`` is the product with its weight in ``dtype`` on ``device``, and nothing else.

    Adapters, hooks and replaced ``forward`` functions compute more than the product. Quantised, sharded and offloaded
    weights do not hold their values.
    """
    if type(projection) is not nn.Linear:
        return False
    weight: Tensor = projection.weight
    return (
        type(weight) in PLAIN_WEIGHTS
        and weight.dtype == dtype
        and weight.device == device
        and projection.bias is None
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
        and not _has_any_global_hook()
        and keeps_forward(projection)
    )


def keeps_forward(projection: nn.Module) -> bool:
    """Return whether ``projection`` has the ``forward`` of its class, or accelerate's, which only moves tensors."""
    hook = getattr(projection, "_hf_hook", None)
    before = getattr(projection, "_old_forward", None)
    moves = type(hook).__name__ == "AlignDevicesHook" and getattr(before, "__func__", None) is type(projection).forward
    return moves or "forward" not in projection.__dict__


def with_sinks(output: Tensor, lse: Tensor, extras: dict[str, Any]) -> Tensor:
    """Scale ``output`` [B, n, H, d_v] by the softmax share that sinks leave it; ``lse`` [B, n, H] is without sinks."""
    sinks = extras.get("s_aux")
    return output if sinks is None else output * torch.sigmoid(lse - sinks.to(lse))[..., None].to(output.dtype)


def attend_to_latent(
    module: Any, query: Tensor, rows: Rows, mask: Tensor | None, extras: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Attend to ``rows`` in absorbed form.

    Args:
        module: the attention layer.
        query: [B, H, n, d_n + d_r].
        rows: the cached rows.
        mask: boolean [B, 1, n, T], or None: every query attends to all rows.
        extras: the other arguments of the attention function; ``scaling`` and ``softcap`` are read.

    Returns:
        Outputs [B, n, H, d_v] and log-sum-exps [B, n, H], both without sinks.
    """
    weight = module.kv_b_proj.weight
    if (weight.dtype, weight.device) != module.placed_for:
        module.choose(module)
    d_n, d_v, rank = module.qk_nope_head_dim, module.v_head_dim, module.kv_lora_rank
    w_uk, w_uv = weight.view(-1, d_n + d_v, rank).split([d_n, d_v], 1)
    q_nope, q_pe = query.split([d_n, query.shape[-1] - d_n], -1)
    q_latent, q_pe = torch.einsum("bhnd,hdr->bnhr", q_nope, w_uk), q_pe.transpose(1, 2)
    pieces, scale = [], extras["scaling"] or module.scaling
    for start in range(0, q_latent.shape[1], PIECE):
        part = slice(start, start + PIECE)
        part_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, part]
        tokens = q_latent[:, part], q_pe[:, part]
        pieces.append(module.decode(*tokens, rows, Scores(scale, part_mask, extras.get("softcap"))))
    mixed, lse = pieces[0] if len(pieces) == 1 else (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
    return torch.einsum("bnhr,hvr->bnhv", mixed, w_uv), lse


def attend_with_others(
    module: Any, layer: SplitLayer, query: Tensor, rows: Rows, mask: Tensor | None, extras: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Attend to this process's ``rows`` of ``layer`` and to those of others; arguments as ``attend_to_latent``."""
    if rows.total:
        own = None if mask is None else layer.columns(mask)
        return merge_shares(*attend_to_latent(module, query, rows, own, extras), layer.ranks)
    batch, heads, new, _ = query.shape
    nothing = query.new_zeros(batch, new, heads, module.v_head_dim)
    lse = query.new_full((batch, new, heads), float("-inf"), dtype=torch.float32)
    return merge_shares(nothing, lse, layer.ranks)


def attend_with_prefix(
    module: Any, layer: PrefixLayer, query: Tensor, rows: Rows, mask: Tensor | None, extras: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Attend to the shared prefix of ``layer`` and to each sequence's ``rows``; arguments as ``attend_to_latent``."""
    batch, heads, new, width = query.shape
    suffix_mask = None if mask is None else mask[..., layer.shared :]
    right, right_lse = attend_to_latent(module, query, rows, suffix_mask, extras)
    # All sequences share the prefix, so their queries form one batch entry with B n tokens.
    together = query.transpose(0, 1).reshape(1, heads, batch * new, width)
    if extras.get("softcap") is None and expanding_is_cheaper(module, batch * new):
        output, lse = attend(together, *_expanded_prefix(module, layer), scaling=extras["scaling"] or module.scaling)
        left, left_lse = output[..., -module.v_head_dim :].transpose(1, 2), lse.transpose(1, 2)
    else:
        left, left_lse = attend_to_latent(module, together, layer.shared_rows, None, extras)
    left, left_lse = left.view(batch, new, heads, -1), left_lse.reshape(batch, new, heads)
    return merge(left, left_lse, right, right_lse), torch.logaddexp(left_lse, right_lse)


def _expanded_prefix(module: Any, layer: PrefixLayer) -> tuple[Tensor, Tensor]:
    """Keys and values [1, H, P, width] of the prefix, padded to one width and kept for the next step."""
    if layer.expanded is None:
        keys, values = one_width(*module.expanded(layer.shared_rows))
        layer.expanded = keys, values
    return layer.expanded
