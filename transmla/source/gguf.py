"""Read GGUF files. A file is unpacked once into the Hugging Face cache, because parsing one takes up to a minute.

The unpacked folder is an ordinary checkpoint: config, tokenizer and weights in bfloat16.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from transmla.boundary import boundary
from transmla.errors import TransmlaError, missing_package
from transmla.files import write_json, write_tensors, write_text
from transmla.source.gguf_header import check_header, read_gguf_card
from transmla.source.load import load_model, load_tokenizer

# Largest GGUF file, in bytes, that is unpacked. A file of 4 bits per weight unpacks to four times its size.
LARGEST = 8 * 2**30
GROWTH = 4
# Number of the layout of unpacked folders, to change with their files.
LAYOUT = 2
# Words that every tokenizer of a language model with words has as tokens.
WORDS = ("the", "and", "water")


def unpacked(path: Path) -> Path:
    """Return the folder of an unpacked GGUF file, or ``path`` if the file is too large or the cache cannot hold it.

    Raises:
        TransmlaError: if the file cannot be read.
    """
    folder = _cache_folder(path)
    if folder is None:
        return path
    if not (folder / "config.json").is_file():
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _unpack(path, scratch)
            # Another process may have unpacked the same file meanwhile.
            if not folder.exists():
                scratch.replace(folder)
        except OSError:  # a full disk
            return path
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _unpack(path: Path, folder: Path) -> None:
    from transformers import GenerationConfig

    model = load_gguf(path)
    tokenizer = load_tokenizer(path)
    check_words(tokenizer, path)
    write_tensors(folder / "model.safetensors", gguf_tensors(model))
    GenerationConfig.from_model_config(model.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if card := read_gguf_card(path):
        write_text(folder / "README.md", f"---\n{yaml.safe_dump(card)}---\n")
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("quantization_config", None)
    # Written last: a folder without a config is unfinished.
    write_json(folder / "config.json", config | {"architectures": [type(model).__name__]})


def _cache_folder(path: Path) -> Path | None:
    """Return the folder that a GGUF file is unpacked to; None if it is not unpacked."""
    from huggingface_hub import cached_assets_path
    from transformers import __version__

    stat = path.stat()
    key = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, __version__, LAYOUT]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    try:
        parent = Path(cached_assets_path("transmla", namespace="gguf", subfolder="unpacked"))
    except (OSError, ValueError):  # ValueError: a file lies where the cache's folder should be
        return None
    if (parent / digest / "config.json").is_file():
        return parent / digest
    fits = stat.st_size <= LARGEST and shutil.disk_usage(parent).free > 2 * GROWTH * stat.st_size
    return parent / digest if fits and os.access(parent, os.W_OK) else None


def load_gguf(path: Path) -> Any:
    """Load the model of a GGUF file in bfloat16.

    Raises:
        TransmlaError: if ``gguf`` is not installed, or the file is damaged or scales its rotary frequencies.
    """
    if importlib.util.find_spec("gguf") is None:
        raise missing_package("reading a GGUF file needs the 'gguf' package", "gguf")
    with boundary(f"'{path.name}' cannot be read as GGUF", remedy="download it again"):
        check_header(path)
        _refuse_lost_scaling(path)
        return load_model(path, dtype=torch.bfloat16)


def gguf_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a loaded model by name, without a head that is the embedding."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    return {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def check_words(tokenizer: Any, path: Path) -> None:
    """Check that a tokenizer rebuilt from a GGUF file makes its word tokens.

    transformers 5.17 rebuilds the tokenizers of some files (Gemma 3) without their merges. Words then fall into
    letters, and the model's perplexity rises tenfold.

    Raises:
        TransmlaError: if a word that the vocabulary holds is split.
    """
    from transformers import __version__

    vocabulary = tokenizer.get_vocab()
    for word in WORDS:
        tokens = {vocabulary[form] for form in (f"▁{word}", f"Ġ{word}") if form in vocabulary}
        if tokens and not tokens & set(tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]):
            raise TransmlaError(
                f"transformers {__version__} rebuilds the tokenizer of '{path.name}' wrongly",
                limit=f"it splits '{word}', which is a token",
                remedy="upgrade transformers, or give the original checkpoint folder",
            )


def _refuse_lost_scaling(path: Path) -> None:
    """Refuse a GGUF file with RoPE scaling. transformers ignores the scaling, which silently changes the model.

    Raises:
        TransmlaError: if the file scales its rotary frequencies.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    scaling = next((field for name, field in reader.fields.items() if name.endswith(".rope.scaling.type")), None)
    kind = "none" if scaling is None else str(scaling.contents())
    if kind != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise TransmlaError(
            f"'{path.name}' scales its rotary frequencies",
            limit="transformers ignores the RoPE scaling in a GGUF file",
            remedy="convert the original checkpoint folder",
        )
