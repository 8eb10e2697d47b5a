"""Loading MLA models so that plain ``generate()`` decodes over their latent cache."""

from __future__ import annotations

import logging
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from transmla.errors import TransmlaError
from transmla.kernels import Backend, DecodeShape, choose_backend
from transmla.kernels.compiled import compilable

_log = logging.getLogger(__name__)

FLOAT8 = "float8_e4m3fn"


def load(path: str | Path, *, backend: str = "auto", cache_dtype: str | None = None, **kwargs: Any) -> Any:
    """Load a causal language model with MLA for fast decoding.

    Args:
        path: an export, a checkpoint folder or a Hub id: any MLA model that transformers runs.
        backend: the decode kernels: ``auto``, ``torch``, ``triton``, ``hopper``, ``flashmla`` or ``flashinfer``.
        cache_dtype: ``float8_e4m3fn`` to cache latents in 8 bits, with a scale for each token.
        kwargs: for ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map``, …).

    Returns:
        An ordinary transformers model, in evaluation mode.

    Raises:
        TransmlaError: if it cannot be loaded, or has no MLA layer.
    """
    from transformers import AutoModelForCausalLM

    from transmla.auto import register

    register()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise TransmlaError(
            f"transformers cannot load '{path}'",
            limit=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            remedy="give the folder of an export or the Hub id of an MLA model",
        ) from error
    return accelerate(model, backend=backend, cache_dtype=cache_dtype)


def accelerate(model: Any, *, backend: str = "auto", cache_dtype: str | None = None) -> Any:
    """Let a loaded ``model`` decode over its latent; changes it in place and returns it.

    Only this model's MLA layers change, by taking a subclass of their class; weights and state dict stay as they
    are, and so does what ``save_pretrained`` writes.

    Raises:
        TransmlaError: if it has no MLA layer that transformers' own code runs, or an unknown ``backend`` or
            ``cache_dtype`` (see ``load``).
    """
    from transmla.modeling.attention import LATENT_ATTENTION, LatentAttention, latent_class

    layers = [module for module in model.modules() if hasattr(module, "kv_b_proj") and hasattr(module, "expand_kv")]
    if not layers:
        raise TransmlaError(
            f"{type(model).__name__} has no MLA layer to accelerate",
            limit="its attention must cache a latent and have transformers' `expand_kv`",
            remedy="convert it with `transmla convert`, and load the export",
        )
    if cache_dtype not in (None, FLOAT8):
        raise TransmlaError(
            f"unknown cache_dtype '{cache_dtype}'", limit=f"{FLOAT8}, or none for the model's own", remedy="choose one"
        )
    if cache_dtype is not None and any(getattr(layer, "sliding_window", None) for layer in layers):
        raise TransmlaError(
            f"{type(model).__name__} has sliding windows",
            limit="rows of 8 bits are held by caches that only grow",
            remedy="leave out cache_dtype",
        )
    choose = partial(_choose, backend)
    names = set()
    for layer in layers:
        if not isinstance(layer, LatentAttention):
            plain: Any = type(layer)
            layer.__class__ = latent_class(plain)
        layer.packed = cache_dtype is not None
        layer.choose = choose
        layer.choose(layer)
        names.add(f"'{layer.backend.name}': {layer.backend.summary}")
    _log.info("decoding with %s", "; ".join(sorted(names)))
    model.set_attn_implementation(LATENT_ATTENTION)
    return model


def _choose(wanted: str, layer: Any) -> None:
    """Let a layer decode with the backend that serves it where it is, and as it is."""
    weight: torch.Tensor = layer.kv_b_proj.weight
    shape = DecodeShape(layer.num_heads, layer.kv_lora_rank, layer.qk_rope_head_dim, weight.dtype, weight.device)
    layer.backend = _serving(wanted, shape)
    layer.decode = compilable(layer.backend)
    layer.place = weight.dtype, weight.device


@cache
def _serving(wanted: str, shape: DecodeShape) -> Backend:
    # Asked once for each shape, so that what cannot serve is named once.
    return choose_backend(wanted, shape)


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

    from transmla.modeling.attention import LatentAttention
    from transmla.modeling.cache import CACHE
    from transmla.modeling.prefix import share

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
            model(input_ids.to(model.device), logits_to_keep=1, **{CACHE: cache})
    finally:
        for layer in layers:
            layer.packed = packed
    return share(cache, packed=packed)
