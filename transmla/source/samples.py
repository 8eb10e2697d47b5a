"""Samples of a model, drawn once and cached for later runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.files import write_tensors
from transmla.reporter import Reporter
from transmla.source.self_text import SPARE, sample_self, without_repetition

# Tokens in one sample. Longer rows are joined from several, as documents are in pretraining.
SAMPLE_LENGTH = 512
# Largest number of sequences sampled at once, by device type.
SAMPLED_AT_ONCE = {"cuda": 2048, "cpu": 32}
# Largest share of a GPU's memory that the caches of these sequences may use; only the source's weights are beside them.
SAMPLING_SHARE = 0.4


def sample_length(length: int) -> int:
    """Return the tokens in one sample for rows of ``length`` tokens."""
    return min(length, SAMPLE_LENGTH)


def sampled_rows(
    model: Any,
    tokenizer: Any,
    openings: Sequence[Sequence[int]],
    *,
    rows: int,
    length: int,
    seed: int,
    fingerprint: str,
    report: Reporter,
    pool: int = 0,
) -> Tensor:
    """Return rows [rows, length] of samples without repetitive ones.

    The samples are read from the Hugging Face assets cache if they are there, and written to it otherwise.

    Args:
        model: the model to sample from.
        tokenizer: the model's tokenizer.
        openings: what the samples begin with.
        rows: number of rows.
        length: tokens in a row. Above ``SAMPLE_LENGTH``, a row is joined from several samples.
        seed: seed of the samples.
        fingerprint: hash of the model's weights.
        report: receives the progress.
        pool: tokens to sample at least. A later call with ``rows`` for this many tokens then finds them in the cache.
    """
    from safetensors.torch import load_file

    size = sample_length(length)
    # A tokenizer may have more tokens than the model, for example in its chat template.
    vocabulary = model.config.get_text_config().vocab_size
    openings = [opening for opening in openings if max(opening) < vocabulary]
    needed = rows * -(-length // size)
    count = max(needed, -(-pool // size))
    batch = _batch(model, size)
    drawn = count + max(1, round(SPARE * count))
    device = model.device.type
    key = [fingerprint, count, size, seed, device, str(model.dtype), batch, list(map(list, openings))]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    file = _cache_file(digest)
    if file is not None and file.is_file():
        samples = load_file(file)["tokens"]
    else:
        report.stage("sampling from the source", drawn)
        tokens = sample_self(
            model,
            tokenizer,
            sequences=drawn,
            length=size,
            seed=seed,
            batch_size=batch,
            openings=openings,
            progress=lambda done, _: report.advance(done),
        )
        samples = without_repetition(tokens, count)
        if file is not None:
            write_tensors(file, {"tokens": samples})
    return samples[:needed].view(rows, -1)[:, :length].contiguous()


def _cache_file(digest: str) -> Path | None:
    """Return the file that caches samples; None if this user may not write to the cache."""
    from huggingface_hub import cached_assets_path

    try:
        folder = Path(cached_assets_path("transmla", namespace="self", subfolder=digest))
    except (OSError, ValueError):  # ValueError: a file lies where the cache's folder should be
        return None
    return folder / "tokens.safetensors" if os.access(folder, os.W_OK) else None


def _batch(model: Any, length: int) -> int:
    """Return the number of sequences to sample at once. Free memory plays no part, so samples are reproducible."""
    device, config = model.device, model.config.get_text_config()
    if device.type != "cuda":
        return SAMPLED_AT_ONCE["cpu"]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache_bytes = 2 * heads * width * config.num_hidden_layers * model.dtype.itemsize * length
    # The logits of one position, in float32, and their softmax.
    logits_bytes = 3 * 4 * config.vocab_size
    available = torch.cuda.get_device_properties(device).total_memory * SAMPLING_SHARE
    return max(1, min(SAMPLED_AT_ONCE["cuda"], int(available / (cache_bytes + logits_bytes))))
