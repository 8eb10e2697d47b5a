"""Load whole models and tokenizers through transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from transmla.boundary import boundary
from transmla.errors import TransmlaError, missing_package
from transmla.guard.config import check_config
from transmla.guard.folder import GENERATION, check_pickles
from transmla.modeling.registration import register
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.source.gguf_header import check_header, without_tensors
from transmla.source.packed_weights import quantisation

# Files by which transformers recognises a tokenizer.
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a checkpoint folder or GGUF file.

    Raises:
        TransmlaError: if the tokenizer is missing or unreadable.
    """
    if path.suffix == ".gguf":
        # As from an unpacked file: the class that transformers loads may complete what it rebuilt (Qwen's normalizer).
        with TemporaryDirectory() as scratch:
            rebuild_tokenizer(path).save_pretrained(scratch)
            load_config(path).save_pretrained(scratch)
            tokenizer = load_tokenizer(Path(scratch))
        tokenizer.name_or_path = str(path.parent)
        return tokenizer
    check_config(path)
    check_tokenizer(path)
    return _tokenizer(path)


def check_tokenizer(path: Path) -> None:
    """Check that a checkpoint folder has a tokenizer's files. Nothing is loaded; a GGUF file holds its tokenizer.

    Raises:
        TransmlaError: if it has none.
    """
    if path.suffix != ".gguf" and not any((path / name).is_file() for name in TOKENIZERS):
        raise TransmlaError(
            f"no tokenizer in '{path}'",
            limit="calibration, evaluation and the export itself need one",
            remedy="add tokenizer.json and tokenizer_config.json to that folder",
        )


def rebuild_tokenizer(path: Path) -> Any:
    """Return the tokenizer that transformers rebuilds from a GGUF file.

    Raises:
        TransmlaError: if it cannot.
    """
    check_config(path.parent)
    return _tokenizer(path)


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    # Without the registered classes, transformers would not know the class of an export.
    register()
    folder, extra = split_gguf(path)
    with boundary(f"cannot load the tokenizer in '{folder}'", remedy="download its files again, or correct them"):
        with code_refused(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **extra)
        tokenizer("a", add_special_tokens=True)  # some damage shows only at the first text
    return tokenizer


@contextmanager
def code_refused(path: Path) -> Iterator[None]:
    """Convert transformers' demand for ``trust_remote_code`` into a ``TransmlaError``."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise TransmlaError(
            f"'{path}' needs custom code (trust_remote_code)",
            limit="transmla runs no code from a checkpoint",
            remedy="use a model whose classes ship with transformers",
        ) from error


def load_config(path: Path) -> Any:
    """Load the transformers config of a checkpoint folder or GGUF file. Loaders raise any type if it is damaged."""
    from transformers import AutoConfig

    register()
    if path.suffix == ".gguf":
        need_gguf()
        with boundary(f"'{path.name}' cannot be read as GGUF", remedy="download it again"):
            check_header(path)
        with without_tensors(path) as header:
            config = AutoConfig.from_pretrained(header.parent, gguf_file=header.name)
        config.name_or_path = str(path.parent)
        return _named_outputs(config)
    check_config(path)
    with code_refused(path):
        return _named_outputs(AutoConfig.from_pretrained(path, trust_remote_code=False))


def need_gguf() -> None:
    """Check that the package ``gguf`` is installed.

    Raises:
        TransmlaError: if it is not.
    """
    if importlib.util.find_spec("gguf") is None:
        raise missing_package("reading a GGUF file needs the 'gguf' package", "gguf")


def _named_outputs(config: Any) -> Any:
    """Return ``config``, so that models return their outputs by name whatever the checkpoint's config says."""
    config.return_dict = True
    return config


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


def load_model(path: Path, *, dtype: torch.dtype | str, allow_pickle: bool = False, **kwargs: Any) -> Any:
    """Load a whole causal LM through transformers, in evaluation mode. A GGUF file is dequantised.

    Args:
        path: checkpoint folder or GGUF file.
        dtype: dtype of the parameters, as ``from_pretrained`` takes it.
        allow_pickle: whether pickled weights may be opened.
        kwargs: further arguments of ``from_pretrained``.

    Raises:
        TransmlaError: if the folder holds pickled weights only and ``allow_pickle`` is off, if its config asks for more
            than its tensors can hold, if the model needs code from the checkpoint, or if its files are damaged.
    """
    import transformers

    folder, extra = split_gguf(path)
    packed = False
    if not extra:
        check_config(folder)
        extra["use_safetensors"] = not check_pickles(folder, allow=allow_pickle)
        packed = quantisation(folder) is not None
    gguf_config = getattr(transformers, "GgufConfig", None)
    if "gguf_file" in extra and gguf_config is not None:
        # From 5.2x on, transformers keeps GGUF weights packed by default.
        extra["quantization_config"] = gguf_config(dequantize=True)
    what, remedy = f"cannot load '{path}' as a causal LM", "check the files, and that the model fits into the memory"
    with boundary(what, remedy=remedy), code_refused(path):
        if packed:
            model = _load_packed(folder, dtype, **kwargs)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, **extra, **kwargs
            )
    _named_outputs(model.config)
    if getattr(model.config, "attn_logit_softcapping", None):
        # Until 5.22, transformers chose another attention by default, and that attention ignores the soft caps.
        model.set_attn_implementation("eager")
    return model.eval()


def _load_packed(folder: Path, dtype: torch.dtype | str, **kwargs: Any) -> Any:
    """Load a causal LM whose weights are packed; they are dequantised without the packages that made them."""
    from transformers import GenerationConfig

    from transmla.source.checkpoint import open_checkpoint
    from transmla.source.describe import empty_model

    checkpoint, config = open_checkpoint(folder), load_config(folder)
    del config.quantization_config
    tensors = {name: checkpoint.read(name) for name in checkpoint.shapes}
    model = type(empty_model(config)).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **kwargs)
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


@torch.no_grad()
def check_runs(model: Any, path: Path) -> None:
    """Run a model on two tokens, and decode one more: much of a config is read only then.

    Raises:
        TransmlaError: if the model cannot run.
    """
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    with boundary(f"the model of '{path}' cannot run", remedy="use the config.json that belongs to its weights"):
        cache = model(tokens, use_cache=True)[CACHE_ARGUMENT]
        model(tokens[:, :1], use_cache=True, **{CACHE_ARGUMENT: cache})
