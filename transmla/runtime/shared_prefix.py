"""Make a cache that holds one prompt for many continuations."""

from __future__ import annotations

from typing import Any

import torch

from transmla.errors import TransmlaError


def shared_prefix(model: Any, input_ids: torch.Tensor) -> Any:
    """A cache that holds one prompt once, for any number of continuations.

    Args:
        model: from ``load`` or ``accelerate``.
        input_ids: the prompt [1, P].

    Returns:
        What ``generate`` takes as ``past_key_values`` (``cache`` from transformers 5.24 on), beside ``input_ids``
        [B, P + n] that begin with the prompt (n ≥ 1; shorter ones padded between prompt and continuation, with an
        ``attention_mask`` that says so). It is spent by one ``generate``; ``copy.deepcopy`` it before to use it again.

    Raises:
        TransmlaError: for several prompts, or a model that is not accelerated.
    """
    from transformers import DynamicCache

    from transmla.modeling.transformers_api import CACHE_ARGUMENT
    from transmla.runtime.latent_attention import LatentAttention
    from transmla.runtime.prefix_cache import share

    if input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise TransmlaError(
            f"input_ids of shape {list(input_ids.shape)}", limit="a shared prefix is one prompt", remedy="give [1, P]"
        )
    if not any(isinstance(module, LatentAttention) for module in model.modules()):
        raise TransmlaError(
            f"{type(model).__name__} is not accelerated",
            limit="stock attention knows no shared prefix",
            remedy="load it with transmla.load, or pass it to transmla.accelerate",
        )
    layers = [module for module in model.modules() if isinstance(module, LatentAttention)]
    kept = model.config.num_hidden_layers - len(layers)
    if kept:
        raise TransmlaError(
            f"{kept} layers of {type(model).__name__} kept the source's attention",
            limit="a shared prefix is held by latent layers alone",
            remedy="give generate() the whole prompts, or convert all layers",
        )
    packed = layers[0].packed
    cache = DynamicCache(config=model.config)
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise TransmlaError(
            f"{type(model).__name__} has sliding windows",
            limit="a shared prefix is seen whole, however far behind",
            remedy="give generate() the whole prompts",
        )
    try:
        # What all sequences share is held once, and need not be packed.
        for layer in layers:
            layer.packed = False
        with torch.no_grad():
            model(input_ids.to(model.device), logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    finally:
        for layer in layers:
            layer.packed = packed
    return share(cache, packed=packed)
