"""Cache one prompt for many continuations."""

from __future__ import annotations

from typing import Any

import torch

from transmla.errors import TransmlaError


def shared_prefix(model: Any, input_ids: torch.Tensor) -> Any:
    """Return a cache that holds one prompt once, for any number of continuations.

    Pass the cache to ``generate`` as ``past_key_values`` (``cache`` from transformers 5.24 on). Every row of its
    ``input_ids`` [B, P + n] must begin with the prompt, with n ≥ 1. Pad shorter rows between prompt and continuation,
    and mark the padding in ``attention_mask``.

    One ``generate`` call changes the cache. Pass a ``copy.deepcopy`` to use the cache again.

    Args:
        model: a model from ``load`` or ``accelerate``.
        input_ids: the prompt [1, P].

    Raises:
        TransmlaError: if ``input_ids`` is not one prompt, if the model is not accelerated, or if some of its layers
            have no latent or have sliding windows.
    """
    from transformers import DynamicCache

    from transmla.modeling.transformers_api import CACHE_ARGUMENT
    from transmla.runtime.latent_attention import LatentAttention
    from transmla.runtime.prefix_cache import share

    layers = [module for module in model.modules() if isinstance(module, LatentAttention)]
    _check_shareable(model, input_ids, len(layers))
    packed = layers[0].packed
    cache = DynamicCache(config=model.config)
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise TransmlaError(
            f"{type(model).__name__} has sliding windows",
            limit="every token attends to a whole shared prefix, at any distance",
            remedy="give generate() the whole prompts",
        )
    try:
        # The prefix is cached once for all sequences, so packing it would save little.
        for layer in layers:
            layer.packed = False
        with torch.no_grad():
            model(input_ids.to(model.device), logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    finally:
        for layer in layers:
            layer.packed = packed
    return share(cache, packed=packed)


def _check_shareable(model: Any, input_ids: torch.Tensor, latent_layers: int) -> None:
    """Raise a TransmlaError if ``input_ids`` is not one prompt, or if a layer of ``model`` has no latent cache."""
    if input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise TransmlaError(
            f"input_ids of shape {list(input_ids.shape)}",
            limit="a shared prefix is one prompt",
            remedy="give input_ids of shape [1, P]",
        )
    if not latent_layers:
        raise TransmlaError(
            f"{type(model).__name__} is not accelerated",
            limit="transformers' attention does not support a shared prefix",
            remedy="load the model with transmla.load, or pass it to transmla.accelerate",
        )
    layers = model.config.num_hidden_layers
    if latent_layers != layers:
        raise TransmlaError(
            f"{layers - latent_layers} of {layers} layers of {type(model).__name__} kept the source's attention",
            limit="only layers with a latent cache support a shared prefix",
            remedy="give generate() the whole prompts, or convert all layers",
        )
