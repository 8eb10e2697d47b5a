"""Texts for training and evaluation. All texts have equal shares, and a batch depends only on its step number."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.errors import TransmlaError
from transmla.heal.checks import check_amount
from transmla.heal.settings import Healing
from transmla.reporter import Reporter
from transmla.source.self_text import sample_self
from transmla.source.text import load_tokens

# Largest number of sequences sampled at once, by device type.
SAMPLED_AT_ONCE = {"cuda": 2048, "cpu": 32}
# Largest share of a GPU's memory that the caches of these sequences may use.
SAMPLING_SHARE = 0.2


class TokenStream:
    """An endless series of training sequences from one text, in a new order each epoch.

    Attributes:
        name: the text's name.
        length: tokens per sequence.
        seed: seed of the orders.
        tokens: the training tokens.
        held_out: the held-out sequences [held_out, length], which are never trained on.
        sequences: sequences per epoch.
    """

    def __init__(self, name: str, tokens: Tensor, *, length: int, held_out: int, seed: int) -> None:
        """Split a text into training and held-out tokens.

        Args:
            name: the text's name.
            tokens: one stream [N], cut at another offset each epoch; or rows [n, length], which stay whole.
            length: tokens per sequence.
            held_out: sequences to hold out, taken from the end of the text.
            seed: seed of orders and offsets.
        """
        self.name, self.length, self.seed = name, length, seed
        self._cached_epoch: tuple[int, tuple[int, Tensor]] | None = None
        held_out_size = held_out * length if tokens.dim() == 1 else held_out
        self.tokens, self.held_out = tokens[:-held_out_size], tokens[-held_out_size:].reshape(-1, length)
        # A stream gives up one sequence, so that an epoch can start at any offset below `length`.
        self.sequences = (len(self.tokens) // length - 1) if tokens.dim() == 1 else len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        """Return sequence ``index`` [length] of the endless series."""
        epoch, position = divmod(index, self.sequences)
        offset, order = self._epoch(epoch)
        row = int(order[position])
        if self.tokens.dim() == 2:
            return self.tokens[row]
        start = offset + row * self.length
        return self.tokens[start : start + self.length]

    def _epoch(self, epoch: int) -> tuple[int, Tensor]:
        """Return the offset of the first cut and the order [sequences] of an epoch; the last result is cached."""
        if self._cached_epoch is None or self._cached_epoch[0] != epoch:
            self._cached_epoch = epoch, self._draw(epoch)
        return self._cached_epoch[1]

    def _draw(self, epoch: int) -> tuple[int, Tensor]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        offset = int(torch.randint(self.length, (1,), generator=generator))
        return offset, torch.randperm(self.sequences, generator=generator)


class Batches:
    """Batches of ``batch`` sequences from several texts, in equal shares."""

    def __init__(self, texts: list[TokenStream], batch: int) -> None:
        self.texts, self.batch = texts, batch

    def __getitem__(self, step: int) -> Tensor:
        """Return the batch of ``step`` [batch, length]; the number of processes does not matter."""
        rows = []
        for i in range(step * self.batch, (step + 1) * self.batch):
            index, which = divmod(i, len(self.texts))
            rows.append(self.texts[which][index])
        return torch.stack(rows)

    def fingerprint(self) -> str:
        """Return one SHA-256 hash of all training and held-out tokens."""
        digest = hashlib.sha256()
        for text in self.texts:
            for part in (text.tokens, text.held_out):
                digest.update(str(tuple(part.shape)).encode())
                digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()

    def held_out(self) -> Tensor:
        """Return the held-out sequences [texts · held_out, length], alternating between the texts."""
        return torch.stack([text.held_out for text in self.texts], 1).flatten(0, 1)


def open_texts(settings: Healing, tokenizer: Any, teacher: Any, fingerprint: str, report: Reporter) -> Batches:
    """Open all texts of ``settings``. The text ``self`` is sampled from ``teacher`` once and cached for later runs.

    Args:
        settings: names and amounts of the texts.
        tokenizer: the teacher's tokenizer.
        teacher: the model that ``self`` is sampled from.
        fingerprint: hash of the teacher's weights, which identifies the cached samples.
        report: receives the progress.

    Raises:
        TransmlaError: if a text is too short, or holds a token outside the teacher's vocabulary.
    """
    share = -(-settings.max_tokens // len(settings.data))
    texts = []
    for name in settings.data:
        if name == "self":
            tokens = self_text(settings, tokenizer, teacher, fingerprint, report)
        else:
            report.stage(f"reading {name}", 1)
            extra = (settings.held_out + 1) * settings.length
            tokens = load_tokens(name, tokenizer, limit=share + extra, split=settings.split, column=settings.column)
            report.advance(1, f"{len(tokens):,} tokens")
        _check_text(name, tokens, settings, teacher)
        texts.append(TokenStream(name, tokens, length=settings.length, held_out=settings.held_out, seed=settings.seed))
    return Batches(texts, settings.batch)


def _check_text(name: str, tokens: Tensor, settings: Healing, teacher: Any) -> None:
    vocabulary = teacher.config.vocab_size
    if int(tokens.max()) >= vocabulary:
        raise TransmlaError(
            f"'{name}' holds token {int(tokens.max())}",
            limit=f"the teacher's vocabulary has {vocabulary} entries",
            remedy="use the tokenizer that belongs to the teacher",
        )
    check_amount(name, tokens.numel(), settings)


def _sampling_batch(model: Any, length: int) -> int:
    """Return the number of sequences to sample at once. Free memory plays no part, so samples are reproducible."""
    device, config = model.device, model.config
    if device.type != "cuda":
        return SAMPLED_AT_ONCE["cpu"]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache_bytes = 2 * config.num_key_value_heads * width * config.num_hidden_layers * model.dtype.itemsize * length
    available = torch.cuda.get_device_properties(device).total_memory * SAMPLING_SHARE
    return max(1, min(SAMPLED_AT_ONCE["cuda"], int(available / cache_bytes)))


def self_text(settings: Healing, tokenizer: Any, teacher: Any, fingerprint: str, report: Reporter) -> Tensor:
    """Return rows [n, length] sampled from the teacher at temperature 1, with n · length ≥ ``settings.self_tokens``.

    The samples are read from the Hugging Face assets cache if they are there, and written to it otherwise. The
    arguments are those of ``open_texts``.
    """
    from huggingface_hub import cached_assets_path
    from safetensors.torch import load_file

    from transmla.export.files import write_tensors

    rows = -(-settings.self_tokens // settings.length)
    device = teacher.device.type
    batch = _sampling_batch(teacher, settings.length)
    key = f"{fingerprint} {rows} {settings.length} {settings.seed} {device} {teacher.dtype} {batch}"
    folder = cached_assets_path("transmla", namespace="self", subfolder=hashlib.sha256(key.encode()).hexdigest()[:32])
    file = Path(folder) / "tokens.safetensors"
    if not file.is_file():
        report.stage("sampling from the teacher", rows)
        tokens = sample_self(
            teacher,
            tokenizer,
            sequences=rows,
            length=settings.length,
            seed=settings.seed,
            batch_size=batch,
            progress=lambda done, _: report.advance(done),
        )
        write_tensors(file, {"tokens": tokens})
    return load_file(file)["tokens"]
