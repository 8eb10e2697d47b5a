"""Open a model given by name for decoding: its context, its tokenizer, and its weights over a latent cache."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from transmla.evaluate.compare import load_errors, load_named
from transmla.modeling.sdpa import without_cudnn
from transmla.runtime.load import accelerate, mla_layers
from transmla.source.load import check_runs, load_config, load_tokenizer
from transmla.source.locate import resolve_source

T = TypeVar("T")


def context_of(path: Path) -> int | None:
    """Return the context of a model in tokens, read from its config; None if the config names none.

    Args:
        path: checkpoint folder or GGUF file.

    Raises:
        TransmlaError: if the config cannot be read.
    """
    with load_errors(path):
        config = load_config(path).get_text_config()
    context: int | None = getattr(config, "max_position_embeddings", None)
    return context


def open_model(path: Path, *, dtype: str, device: torch.device, allow_pickle: bool = False) -> tuple[Any, Any]:
    """Load a model and its tokenizer. A model with MLA layers decodes over its latent cache, as by ``transmla.load``.

    Args:
        path: checkpoint folder or GGUF file of an export, a source or any other causal LM.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: device of the model.
        allow_pickle: whether pickled weights may be opened.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        TransmlaError: if model or tokenizer cannot be loaded, or the model cannot run.
    """
    with load_errors(path):
        tokenizer = load_tokenizer(path)
    model = load_named(path, dtype, device, allow_pickle=allow_pickle)
    if mla_layers(model):
        accelerate(model)
        check_runs(model, path)
    return model, tokenizer


def for_each_model(
    model: str,
    baseline: str | None,
    *,
    dtype: str,
    device: torch.device,
    run: Callable[[Any, Any, str], T],
    allow_pickle: bool = False,
) -> dict[str, T]:
    """Run a measurement on a baseline and a model. Only one of them is in memory at a time.

    Args:
        model: folder, GGUF file or Hub name.
        baseline: the same for the baseline, or None.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: device of the models.
        run: the measurement; takes the model, its tokenizer and its role.
        allow_pickle: whether pickled weights may be opened.

    Returns:
        The results by role: ``baseline``, if there is one, and ``model``.

    Raises:
        TransmlaError: if a model cannot be found or loaded.
    """
    # Both are found before one is loaded.
    paths = {
        role: resolve_source(name, allow_pickle=allow_pickle)
        for role, name in (("baseline", baseline), ("model", model))
        if name is not None
    }
    results = {}
    for role, path in paths.items():
        loaded, tokenizer = open_model(path, dtype=dtype, device=device, allow_pickle=allow_pickle)
        with without_cudnn():
            results[role] = run(loaded, tokenizer, role)
        del loaded
        release_memory()
    return results


def release_memory() -> None:
    """Return the memory of deleted models to the device, before the next model is loaded."""
    gc.collect()
    torch.cuda.empty_cache()
