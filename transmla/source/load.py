"""Load whole models and tokenizers through transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transmla.errors import TransmlaError
from transmla.modeling.transformers_api import register


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a checkpoint folder or GGUF file.

    Raises:
        TransmlaError: if the tokenizer is missing or unreadable.
    """
    from transformers import AutoTokenizer

    folder, extra = split_gguf(path)
    # Without the registered classes, transformers would ask for trust_remote_code when ``folder`` is an export.
    register()
    try:
        return AutoTokenizer.from_pretrained(folder, **extra)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TransmlaError(
            f"no tokenizer in '{folder}'",
            limit="calibration, evaluation and the export itself need one",
            remedy="add tokenizer.json and tokenizer_config.json to that folder",
        ) from error


def load_config(path: Path) -> Any:
    """Load the transformers config of a checkpoint folder or GGUF file. Loaders raise any type if it is damaged."""
    from transformers import AutoConfig

    folder, extra = split_gguf(path)
    register()
    return AutoConfig.from_pretrained(folder, **extra)


@contextmanager
def eval_mode(model: nn.Module | None) -> Iterator[None]:
    """Put ``model`` into evaluation mode inside the block, then restore every module's training flag."""
    training = [] if model is None else [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def split_gguf(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the additional ``from_pretrained`` arguments for a checkpoint folder or GGUF file."""
    return (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})


def load_model(path: Path, *, dtype: torch.dtype | str, **kwargs: Any) -> Any:
    """Load a whole causal LM through transformers, in evaluation mode. A GGUF file is dequantised.

    Args:
        path: checkpoint folder or GGUF file.
        dtype: dtype of the parameters, as ``from_pretrained`` takes it.
        kwargs: further arguments of ``from_pretrained``.
    """
    import transformers

    folder, extra = split_gguf(path)
    gguf_config = getattr(transformers, "GgufConfig", None)
    if extra and gguf_config is not None:
        # From 5.2x on, transformers keeps GGUF weights packed by default.
        extra["quantization_config"] = gguf_config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra, **kwargs)
    if getattr(model.config, "attn_logit_softcapping", None):
        # Until 5.22, transformers chose another attention by default, and that attention ignores the soft caps.
        model.set_attn_implementation("eager")
    return model.eval()
