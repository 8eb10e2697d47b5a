"""Load MLA models so that plain ``generate()`` decodes over their latent cache."""

from __future__ import annotations

import logging
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from transmla.boundary import boundary
from transmla.errors import TransmlaError
from transmla.guard.config import check_config
from transmla.guard.folder import check_folder
from transmla.kernels import Backend, DecodeShape, choose_backend
from transmla.kernels.custom_op import compilable
from transmla.runtime.float16 import refuse_float16

_log = logging.getLogger(__name__)

# The only value of ``cache_dtype`` besides None.
FLOAT8 = "float8_e4m3fn"


def load(path: str | Path, *, backend: str = "auto", cache_dtype: str | None = None, **kwargs: Any) -> Any:
    """Load a causal language model with MLA for fast decoding.

    Args:
        path: an export, a checkpoint folder or a Hub id. Any MLA model that transformers runs is accepted.
        backend: the decode kernels: ``auto``, ``torch``, ``triton``, ``hopper``, ``flashmla`` or ``flashinfer``.
        cache_dtype: ``float8_e4m3fn`` to cache latents as float8 with one scale per token; None for the model's dtype.
        kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map``, …).

    Returns:
        A transformers model in evaluation mode.

    Raises:
        TransmlaError: if transformers cannot load the model, or for any reason listed in ``accelerate``.
    """
    from transformers import AutoModelForCausalLM

    from transmla.modeling.transformers_api import register

    register()
    # Without these, transformers would ask whether to run the checkpoint's code, and would open pickled weights.
    kwargs = {"trust_remote_code": False, "use_safetensors": True} | kwargs
    what, remedy = f"transformers cannot load '{path}'", "give the folder of an export or the Hub id of an MLA model"
    with boundary(what, remedy=remedy):
        if Path(path).is_dir():
            check_folder(Path(path))
            check_config(Path(path))
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    return accelerate(model, backend=backend, cache_dtype=cache_dtype)


def accelerate(model: Any, *, backend: str = "auto", cache_dtype: str | None = None) -> Any:
    """Change a loaded model in place so that it decodes over its latent cache.

    Each MLA layer of this model becomes an instance of a subclass of its class. The weights, the state dict and the
    files that ``save_pretrained`` writes do not change.

    Args:
        model: a transformers model with MLA layers.
        backend: see ``load``.
        cache_dtype: see ``load``.

    Returns:
        ``model``.

    Raises:
        TransmlaError: if the model has no MLA layer with transformers' ``expand_kv``, if ``backend`` or
            ``cache_dtype`` is unknown, if a model with sliding windows is to cache float8 latents, or if a native
            export is in float16.
    """
    from transmla.runtime.latent_attention import LATENT_ATTENTION, LatentAttention, latent_class

    layers = mla_layers(model)
    if not layers:
        raise TransmlaError(
            f"{type(model).__name__} has no MLA layer to accelerate",
            limit="the attention must cache a latent and have transformers' `expand_kv` method",
            remedy="convert the model with `transmla convert`, then load the export",
        )
    if cache_dtype not in (None, FLOAT8):
        raise TransmlaError(
            f"unknown cache_dtype '{cache_dtype}'",
            limit=f"supported: {FLOAT8}",
            remedy="use that, or leave out cache_dtype",
        )
    if cache_dtype is not None and any(getattr(layer, "sliding_window", None) for layer in layers):
        raise TransmlaError(
            f"{type(model).__name__} has sliding windows",
            limit="float8 rows need a cache that keeps all tokens",
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


def mla_layers(model: Any) -> list[Any]:
    """Return the attention modules of ``model`` that cache a latent and have transformers' ``expand_kv``."""
    return [module for module in model.modules() if hasattr(module, "kv_b_proj") and hasattr(module, "expand_kv")]


def _choose(backend: str, layer: Any) -> None:
    """Give ``layer`` a backend that serves the current dtype and device of its weights."""
    weight: torch.Tensor = layer.kv_b_proj.weight
    shape = DecodeShape(layer.num_heads, layer.kv_lora_rank, layer.qk_rope_head_dim, weight.dtype, weight.device)
    refuse_float16(layer, weight.dtype)
    layer.backend = choose_for_device(backend, shape)
    layer.decode = compilable(layer.backend)
    layer.placed_for = weight.dtype, weight.device


@cache
def choose_for_device(name: str, shape: DecodeShape) -> Backend:
    """Return ``choose_backend(name, shape)``, cached so that the log names a backend that refuses only once."""
    return choose_backend(name, shape)
