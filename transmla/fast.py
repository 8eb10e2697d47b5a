"""Loading MLA models so that plain ``generate()`` decodes over their latent cache."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from transmla.errors import TransmlaError
from transmla.kernels import Backend, DecodeShape, choose_backend

_log = logging.getLogger(__name__)


def load(path: str | Path, *, backend: str = "auto", **kwargs: Any) -> Any:
    """Load a causal language model with MLA for fast decoding.

    Args:
        path: an export, a checkpoint folder or a Hub id: any MLA model that transformers runs.
        backend: the decode kernels, ``auto`` or one that ``transmla bench`` lists.
        kwargs: for ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map``, …).

    Returns:
        An ordinary transformers model, in evaluation mode.

    Raises:
        TransmlaError: if it cannot be loaded, or has no MLA layer.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise TransmlaError(
            f"transformers cannot load '{path}'",
            limit=str(error).splitlines()[0],
            remedy="give the folder of an export or the Hub id of an MLA model",
        ) from error
    return accelerate(model, backend=backend)


def accelerate(model: Any, *, backend: str = "auto") -> Any:
    """Let a loaded ``model`` decode over its latent; changes it in place and returns it.

    Only this model's MLA layers change, by taking a subclass of their class; weights and state dict stay as they
    are, and so does what ``save_pretrained`` writes.

    Raises:
        TransmlaError: if it has no MLA layer that transformers' own code runs, or an unknown ``backend``.
    """
    from transmla.modeling.attention import LATENT_ATTENTION, LatentAttention, latent_class

    layers = [module for module in model.modules() if hasattr(module, "kv_b_proj") and hasattr(module, "expand_kv")]
    if not layers:
        raise TransmlaError(
            f"{type(model).__name__} has no MLA layer to accelerate",
            limit="its attention must cache a latent and have transformers' `expand_kv`",
            remedy="convert it with `transmla convert`, and load the export",
        )
    chosen: dict[DecodeShape, Backend] = {}
    for layer in layers:
        shape = _shape(layer)
        if shape not in chosen:
            chosen[shape] = choose_backend(backend, shape)
            _log.info("decoding with '%s': %s", chosen[shape].name, chosen[shape].summary)
        if not isinstance(layer, LatentAttention):
            plain: Any = type(layer)
            layer.__class__ = latent_class(plain)
        layer.backend, layer.decode = chosen[shape], chosen[shape].decode
    model.set_attn_implementation(LATENT_ATTENTION)
    return model


def _shape(layer: Any) -> DecodeShape:
    weight: torch.Tensor = layer.kv_b_proj.weight
    return DecodeShape(layer.num_heads, layer.kv_lora_rank, layer.qk_rope_head_dim, weight.dtype, weight.device)
