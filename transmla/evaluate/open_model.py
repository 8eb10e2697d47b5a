"""Open a model given by name for decoding: its context, its tokenizer, and its weights over a latent cache."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from transmla.evaluate.compare import load_errors, load_named
from transmla.modeling.transformers_api import register
from transmla.runtime.load import accelerate, mla_layers
from transmla.source.load import load_tokenizer, split_gguf


def context_of(path: Path) -> int | None:
    """Return the context of a model in tokens, read from its config; None if the config names none.

    Args:
        path: checkpoint folder or GGUF file.

    Raises:
        TransmlaError: if the config cannot be read.
    """
    from transformers import AutoConfig

    register()
    folder, extra = split_gguf(path)
    with load_errors(path):
        config = AutoConfig.from_pretrained(folder, **extra).get_text_config()
    context: int | None = getattr(config, "max_position_embeddings", None)
    return context


def open_model(path: Path, *, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """Load a model and its tokenizer. A model with MLA layers decodes over its latent cache, as by ``transmla.load``.

    Args:
        path: checkpoint folder or GGUF file of an export, a source or any other causal LM.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: device of the model.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        TransmlaError: if model or tokenizer cannot be loaded.
    """
    with load_errors(path):
        tokenizer = load_tokenizer(path)
    model = load_named(path, dtype, device)
    if mla_layers(model):
        accelerate(model)
    return model, tokenizer


def free_memory() -> None:
    """Return the memory of deleted models to the device, before the next model is loaded."""
    gc.collect()
    torch.cuda.empty_cache()
