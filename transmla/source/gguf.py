"""Unpack GGUF files once into the Hugging Face cache, because parsing one takes up to a minute.

The unpacked folder is an ordinary checkpoint: config, tokenizer and weights in bfloat16. Its weights are dequantised
and written one tensor at a time. ``gguf_weights`` reads the files that are too large to be unpacked. ``gguf_copies``
removes the folders whose file is gone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from transmla.errors import TransmlaError
from transmla.files import write_json, write_tensors_in_turn, write_text
from transmla.source.describe import empty_model
from transmla.source.gguf_copies import begin_copy, copy_bytes, origin_of, remove_dead_copies, use_copy
from transmla.source.gguf_header import read_gguf_card
from transmla.source.gguf_weights import DTYPE, GgufWeights
from transmla.source.load import load_config, rebuild_tokenizer

_log = logging.getLogger(__name__)

# Largest GGUF file, in bytes, that is unpacked. A file of 4 bits per weight unpacks to four times its size.
LARGEST = 8 * 2**30
GROWTH = 4
# Number of the layout of unpacked folders, to change with their files.
LAYOUT = 3
# Words that every tokenizer of a language model with words has as tokens.
WORDS = ("the", "and", "water")


def unpacked(path: Path, *, weights: bool = True) -> Path:
    """Return the folder of an unpacked GGUF file, or ``path`` if the file is too large or the cache cannot hold it.

    Args:
        path: the GGUF file.
        weights: whether to unpack the file. Without, the folder is returned if the file has been unpacked before.

    Raises:
        TransmlaError: if the file cannot be read.
    """
    folder = _cache_folder(path, clean=weights)
    if folder is None:
        return path
    if not (folder / "config.json").is_file():
        if not weights:
            return path
        try:
            scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        except OSError:  # a full or read-only disk
            return path
        try:
            begin_copy(scratch, path)
            _unpack(path, scratch)
            # Another process may have unpacked the same file meanwhile. A killed one may have left an empty folder.
            if not (folder / "config.json").is_file():
                scratch.replace(folder)
                size = f"{copy_bytes(folder) / 1e9:.1f} GB"
                _log.warning("unpacked '%s' once, for later commands too: %s in '%s'", path.name, size, folder)
        except OSError:  # a full disk
            return path
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    use_copy(folder)
    # Another process may have removed the copy before, because it saw no such file or another one.
    return folder if (folder / "config.json").is_file() else path


def _unpack(path: Path, folder: Path) -> None:
    from transformers import GenerationConfig

    weights = GgufWeights(path)
    tokenizer = rebuild_tokenizer(path)
    check_words(tokenizer, path)
    shapes = {name: (DTYPE, shape) for name, shape in weights.shapes.items()}
    write_tensors_in_turn(folder / "model.safetensors", shapes, weights.read)
    config = load_config(path)
    config.dtype = DTYPE
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if card := read_gguf_card(path):
        write_text(folder / "README.md", f"---\n{yaml.safe_dump(card)}---\n")
    fields = json.loads(config.to_json_string(use_diff=False))
    # Written last: a folder without a config is unfinished.
    write_json(folder / "config.json", fields | {"architectures": [type(empty_model(config)).__name__]})


def _cache_folder(path: Path, *, clean: bool = False) -> Path | None:
    """Return the folder that a GGUF file is unpacked to; None if it is not unpacked.

    Args:
        path: the GGUF file.
        clean: whether to make room for a new copy by removing those that can never be used again.
    """
    from huggingface_hub import cached_assets_path
    from transformers import __version__

    origin = origin_of(path)
    key = [*origin.values(), __version__, LAYOUT]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    try:
        parent = Path(cached_assets_path("transmla", namespace="gguf", subfolder="unpacked"))
    except (OSError, ValueError):  # ValueError: a file lies where the cache's folder should be
        return None
    if (parent / digest / "config.json").is_file():
        return parent / digest
    if clean:
        remove_dead_copies(parent)
    size = origin["size"]
    fits = size <= LARGEST and shutil.disk_usage(parent).free > 2 * GROWTH * size
    return parent / digest if fits and os.access(parent, os.W_OK) else None


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
