"""Attention to expanded keys and values: by SDPA, or by the family's eager attention if it changes the scores."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transmla.modeling.sdpa import takes_two_widths
from transmla.runtime.head_widths import one_width

# Arguments by which a family changes the scores: a bias, a soft-cap, and sinks (scores [H] of a key without a value).
CHANGES_SCORES = ("position_bias", "softcap", "s_aux")


def attend_expanded(
    module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Attend to ``keys`` [B, h, T, d_n + d_r] and ``values`` [B, h, T, d_v].

    Args:
        module: the attention layer.
        query: [B, H, n, d_n + d_r].
        keys: expanded keys; h = H for MLA layers.
        values: expanded values.
        mask: boolean [B, 1, n, T], additive with the same shape, or None (causal), as for SDPA.
        kwargs: ``scaling``, ``dropout`` and the family's extras.

    Returns:
        Outputs [B, n, H, d_v].
    """
    if any(kwargs.get(name) is not None for name in CHANGES_SCORES):
        return _by_eager(module, query, keys, values, mask, **kwargs)
    if kwargs.get("scaling") is None:
        kwargs["scaling"] = query.shape[-1] ** -0.5
    width = values.shape[-1]
    if kwargs.get("dropout") or not takes_two_widths(query, keys, values, mask):
        query, keys, values = one_width(query, keys, values)
    output: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, keys, values, mask, **kwargs)[0]
    return output[..., -width:]


def _by_eager(module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Run the family's eager attention, because SDPA does not support the family's changes to the scores."""
    family = next(c for c in type(module).__mro__ if c.__module__.startswith("transformers.models."))
    new = query.shape[2]
    if mask is None and new > 1:
        # As for SDPA, no mask means causal from the first key on. Keys behind the queries are unwritten rows of a
        # static cache.
        keys, values = keys[:, :, :new], values[:, :, :new]
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = kwargs["position_bias"][..., :new]
        mask = torch.ones(new, new, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return sys.modules[family.__module__].eager_attention_forward(module, query, keys, values, mask, **kwargs)[0]  # type: ignore[no-any-return]
