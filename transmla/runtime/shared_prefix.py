"""Cache one prompt for many continuations."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from transmla.errors import TransmlaError
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.latent_attention import LatentAttention
from transmla.runtime.latent_cache import LatentLayer
from transmla.runtime.load import refuse_other_objects
from transmla.runtime.prefix_cache import PrefixCache, share

# Largest relative difference of logits that two runs of the same step may have, if the dtype's rounding is smaller.
SAME_STEP = 1e-5


def shared_prefix(model: Any, input_ids: Tensor) -> PrefixCache:
    """Return a cache that holds one prompt once, for any number of continuations.

    Pass the cache to ``generate`` as ``past_key_values`` (``cache`` from transformers 5.24 on). Every row of its
    ``input_ids`` [B, P + n] must begin with the prompt, with n ≥ 1. Pad shorter rows between prompt and continuation,
    and mark the padding in ``attention_mask``.

    The cache can be used for any number of ``generate`` calls. Each call drops what the last one left behind the
    prompt, and refuses tokens that do not begin with the prompt. It also repeats one decoding step, and refuses a
    prefix that was made with other weights.

    Args:
        model: a model from ``load`` or ``accelerate``.
        input_ids: the prompt [1, P].

    Raises:
        TransmlaError: if ``input_ids`` is not one prompt, if the model is not accelerated or cannot generate, or if
            some of its layers have no latent or have sliding windows.
    """
    refuse_other_objects(model, "shared_prefix()")
    layers = [module for module in model.modules() if isinstance(module, LatentAttention)]
    _check_shareable(model, input_ids, len(layers))
    cache: Any = DynamicCache(config=model.config)
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise TransmlaError(
            f"{type(model).__name__} has sliding windows",
            limit="every token attends to a whole shared prefix, at any distance",
            remedy="give generate() the whole prompts",
        )
    # The prefix is cached once for all sequences, so packing it would save little.
    cache.layers = [LatentLayer() for _ in layers]
    prompt = input_ids.to(model.device)
    with torch.no_grad():
        model(prompt, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    prefix = share(cache, packed=layers[0].packed)
    prefix.prompt, prefix.signature = prompt.clone(), _signature(model, prompt, prefix)
    prefix.placed = model.dtype, model.device
    if not isinstance(model.generate, CheckedGenerate):
        model.generate = CheckedGenerate(model)
    return prefix


class CheckedGenerate:
    """The ``generate`` of one model, which first checks a shared prefix. Calls without one are passed on.

    The model holds this object, which refers to the model weakly: deleting the model frees its memory at once.
    """

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)
        functools.update_wrapper(self, type(model).generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, as the model's class does."""
        model: Any = self.model()
        cache = kwargs.get(CACHE_ARGUMENT, kwargs.get("past_key_values"))
        if isinstance(cache, PrefixCache) and cache.prompt is not None:
            given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            _start_behind(model, cache, given)
        return type(model).generate(model, *args, **kwargs)

    def __reduce__(self) -> Any:
        return CheckedGenerate, (self.model(),)


def _start_behind(model: Any, cache: PrefixCache, input_ids: Tensor | None) -> None:
    """Empty ``cache`` behind its prefix, and check that the prefix belongs to ``model`` and ``input_ids``.

    Raises:
        TransmlaError: if a row of ``input_ids`` [B, P + n] does not begin with the prompt, if nothing follows the
            prompt, or if the model's weights changed.
    """
    prompt, signature = cache.prompt, cache.signature
    assert prompt is not None
    assert signature is not None
    length = prompt.shape[1]
    if input_ids is None:
        raise TransmlaError(
            "generate() got a shared prefix without input_ids",
            limit="the prefix is compared with the tokens",
            remedy="give input_ids instead of inputs_embeds",
        )
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        raise TransmlaError(
            f"generate() got {_described(input_ids)} with a shared prefix",
            limit="it takes one row of tokens for each continuation",
            remedy="give input_ids as a tensor of shape [B, P + n]",
        )
    if input_ids.shape[1] <= length:
        raise TransmlaError(
            f"input_ids of shape {list(input_ids.shape)} with a shared prefix of {length} tokens",
            limit="every row holds the prefix and at least one token behind it",
            remedy="give the whole prompts, as without a prefix",
        )
    differs = (input_ids[:, :length] != prompt.to(input_ids.device)).nonzero()
    if len(differs):
        row, position = differs[0].tolist()
        raise TransmlaError(
            f"token {position} of row {row} differs from the shared prefix",
            limit="every row begins with the prompt that shared_prefix() was given",
            remedy="make a shared prefix of this prompt, or call generate() without one",
        )
    cache.reset()
    if not _fits(model, cache):
        raise TransmlaError(
            f"the shared prefix was made by another model than this {type(model).__name__}",
            limit="each model has its own number of layers and its own widths of the cache",
            remedy="call shared_prefix() with this model",
        )
    if (model.dtype, model.device) != cache.placed or _changed(_signature(model, prompt, cache), signature):
        raise TransmlaError(
            "the model computes otherwise than when the shared prefix was made",
            limit="cached rows belong to the weights, adapters, precision and device that made them",
            remedy="call shared_prefix() again",
        )


def _described(input_ids: Any) -> str:
    """Return in words what was given as ``input_ids``."""
    if isinstance(input_ids, Tensor):
        return f"input_ids of shape {list(input_ids.shape)} and type {str(input_ids.dtype).removeprefix('torch.')}"
    return f"input_ids of type {type(input_ids).__name__}"


def _fits(model: Any, cache: PrefixCache) -> bool:
    """Whether the layers of ``model`` can read the rows of ``cache``."""
    layers = [module for module in model.modules() if isinstance(module, LatentAttention)]
    widths = [(layer.kv_lora_rank, layer.qk_rope_head_dim) for layer in layers]
    return widths == [tuple(part.shape[-1] for part in layer.prefix) for layer in cache.layers]


def _changed(now: Tensor, before: Tensor) -> bool:
    """Whether the logits of one step differ by more than two runs of the same step may."""
    if now.shape != before.shape:
        return True
    difference = (now.float() - before.float()).norm() / before.float().norm()
    return not difference <= max(SAME_STEP, torch.finfo(now.dtype).eps)


@torch.no_grad()
def _signature(model: Any, prompt: Tensor, cache: PrefixCache) -> Tensor:
    """Return the logits [1, vocabulary] of the prompt's last token, put once more behind the prefix of ``cache``."""
    logits: Tensor = model(prompt[:, -1:], use_cache=True, **{CACHE_ARGUMENT: cache}).logits
    cache.reset()
    return logits[:, -1]


def _check_shareable(model: Any, input_ids: torch.Tensor, latent_layers: int) -> None:
    """Raise a TransmlaError if ``input_ids`` is not one prompt, or if a layer of ``model`` has no latent cache."""
    one = isinstance(input_ids, Tensor) and input_ids.dim() == 2 and input_ids.shape[0] == 1 and input_ids.numel()
    if not one or input_ids.dtype not in (torch.int64, torch.int32):
        raise TransmlaError(
            f"shared_prefix() got {_described(input_ids)}",
            limit="a shared prefix is one prompt, as token ids",
            remedy="give input_ids as a tensor of integers of shape [1, P]",
        )
    if not hasattr(model, "generate"):
        raise TransmlaError(
            f"{type(model).__name__} cannot generate text",
            limit="a shared prefix is for generate()",
            remedy="load the model with transmla.load",
        )
    if not latent_layers:
        raise TransmlaError(
            f"{type(model).__name__} is not accelerated",
            limit="transformers' attention does not support a shared prefix",
            remedy="load the model with transmla.load, or pass it to transmla.accelerate",
        )
    if any(isinstance(module, LatentAttention) and module.ranks.size > 1 for module in model.modules()):
        raise TransmlaError(
            "shared_prefix() was called for a model with context_parallel",
            limit="every process holds the whole prefix, so none is divided",
            remedy="load the model without context_parallel, or give generate() the whole prompts",
        )
    layers = model.config.num_hidden_layers
    if latent_layers != layers:
        raise TransmlaError(
            f"{layers - latent_layers} of {layers} layers of {type(model).__name__} kept the source's attention",
            limit="only layers with a latent cache support a shared prefix",
            remedy="give generate() the whole prompts, or convert all layers",
        )
