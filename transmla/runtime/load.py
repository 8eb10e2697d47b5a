"""Loading MLA models so that plain ``generate()`` decodes over their latent cache."""

from __future__ import annotations

import logging
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from transmla.errors import TransmlaError
from transmla.kernels import Backend, DecodeShape, choose_backend
from transmla.kernels.custom_op import compilable

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

    from transmla.modeling.transformers_api import register

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
    from transmla.runtime.latent_attention import LATENT_ATTENTION, LatentAttention, latent_class

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
    layer.backend = choose_for_device(wanted, shape)
    layer.decode = compilable(layer.backend)
    layer.place = weight.dtype, weight.device


@cache
def choose_for_device(wanted: str, shape: DecodeShape) -> Backend:
    # Asked once for each shape, so that what cannot serve is named once.
    return choose_backend(wanted, shape)
