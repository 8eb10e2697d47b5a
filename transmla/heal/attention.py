"""Causal attention over whole sequences without masks of transformers.

For every forward pass, transformers checks whether positions start anew within a sequence, and waits for the GPU to
answer. While a CUDA graph is captured, it builds a mask instead, which keeps attention from its fastest kernels. The
sequences of a healing have neither padding nor parts, so the window of a layer is the only mask that is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transmla.modeling.modeling_transmla import window_of

# Name of this attention in transformers, which builds no masks for names that it has none for.
NAME = "transmla_whole_sequences"


def attend_to_whole_sequences(model: Any) -> bool:
    """Make a causal LM attend without masks of transformers; return False if its attention is not ``sdpa``.

    The model then takes whole sequences only: no padding, no cache, positions 0 to T − 1.
    """
    from transformers import AttentionInterface

    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, _attend)
    model.set_attn_implementation(NAME)
    for index, layer in enumerate(model.model.layers):
        # Not read from ``layer_idx`` later: a compiled layer would then be compiled anew for each layer.
        layer.self_attn.window_of_whole_sequences = window_of(layer.self_attn, model.config, index)
    return True


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend as the attention ``sdpa`` of transformers does with a mask: [B, H, T, d] → [B, T, H, d_v]."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    length, window = query.shape[2], module.window_of_whole_sequences
    mask = None
    if window is not None and window < length:
        position = torch.arange(length, device=query.device)
        distance = position[:, None] - position
        mask = ((distance >= 0) & (distance < window))[None, None]
    result: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)
    return result
