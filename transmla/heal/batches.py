"""What a student reads: texts in equal shares, every batch a function of its step alone."""

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

# Sequences sampled at once, and the share of a GPU's memory that their caches may take.
SAMPLED_AT_ONCE = {"cuda": 2048, "cpu": 32}
SAMPLING_SHARE = 0.2


class TokenStream:
    """Sequences of ``length`` tokens from one text, pass after pass, each in another order and cut.

    ``tokens`` is one stream [N], which every pass cuts elsewhere, or rows [n, length], which stay as they are. The
    last ``held_out`` sequences are never given.
    """

    def __init__(self, name: str, tokens: Tensor, *, length: int, held_out: int, seed: int) -> None:
        self.name, self.length, self.seed = name, length, seed
        self._drawn: tuple[int, tuple[int, Tensor]] | None = None
        aside = held_out * length if tokens.dim() == 1 else held_out
        self.tokens, self.held_out = tokens[:-aside], tokens[-aside:].reshape(-1, length)
        # One sequence of a stream is given up, so that it can be cut anywhere.
        self.sequences = (len(self.tokens) // length - 1) if tokens.dim() == 1 else len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        """Sequence ``index`` [length] of an endless series."""
        epoch, place = divmod(index, self.sequences)
        shift, order = self._epoch(epoch)
        row = int(order[place])
        if self.tokens.dim() == 2:
            return self.tokens[row]
        start = shift + row * self.length
        return self.tokens[start : start + self.length]

    def _epoch(self, epoch: int) -> tuple[int, Tensor]:
        """Where a pass cuts, and its order; of the last pass asked for they are remembered."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._draw(epoch)
        return self._drawn[1]

    def _draw(self, epoch: int) -> tuple[int, Tensor]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        shift = int(torch.randint(self.length, (1,), generator=generator))
        return shift, torch.randperm(self.sequences, generator=generator)


class Batches:
    """Batches of several texts, in equal shares."""

    def __init__(self, texts: list[TokenStream], batch: int) -> None:
        self.texts, self.batch = texts, batch

    def __getitem__(self, step: int) -> Tensor:
        """Batch ``step`` [batch, length]: the same for any number of processes."""
        rows = []
        for i in range(step * self.batch, (step + 1) * self.batch):
            index, which = divmod(i, len(self.texts))
            rows.append(self.texts[which][index])
        return torch.stack(rows)

    def fingerprint(self) -> str:
        """One hash of all tokens, learned from and kept aside."""
        digest = hashlib.sha256()
        for text in self.texts:
            for part in (text.tokens, text.held_out):
                digest.update(str(tuple(part.shape)).encode())
                digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()

    def held_out(self) -> Tensor:
        """The sequences kept aside, of all texts in turn."""
        return torch.stack([text.held_out for text in self.texts], 1).flatten(0, 1)


def open_texts(settings: Healing, tokenizer: Any, teacher: Any, fingerprint: str, report: Reporter) -> Batches:
    """All texts of ``settings``; ``self`` is sampled from ``teacher`` once, and kept for other runs.

    Raises:
        TransmlaError: for a text too short for the tokens wanted, with what is missing.
    """
    share = -(-settings.max_tokens // len(settings.data))
    texts = []
    for name in settings.data:
        if name == "self":
            tokens = self_text(settings, tokenizer, teacher, fingerprint, report)
        else:
            report.stage(f"reading {name}", 1)
            more = (settings.held_out + 1) * settings.length
            tokens = load_tokens(name, tokenizer, limit=share + more, split=settings.split, column=settings.column)
            report.advance(1, f"{len(tokens):,} tokens")
        _check(name, tokens, settings, teacher)
        texts.append(TokenStream(name, tokens, length=settings.length, held_out=settings.held_out, seed=settings.seed))
    return Batches(texts, settings.batch)


def _check(name: str, tokens: Tensor, settings: Healing, teacher: Any) -> None:
    words = teacher.config.vocab_size
    if int(tokens.max()) >= words:
        raise TransmlaError(
            f"'{name}' holds token {int(tokens.max())}",
            limit=f"the teacher's vocabulary has {words} entries",
            remedy="use the tokenizer that belongs to the teacher",
        )
    check_amount(name, tokens.numel(), settings)


def _rows_at_once(model: Any, length: int) -> int:
    """Sequences that a device samples at once: a function of the device, so that samples are."""
    device, config = model.device, model.config
    if device.type != "cuda":
        return SAMPLED_AT_ONCE["cpu"]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_key_value_heads * width * config.num_hidden_layers * model.dtype.itemsize * length
    room = torch.cuda.get_device_properties(device).total_memory * SAMPLING_SHARE
    return max(1, min(SAMPLED_AT_ONCE["cuda"], int(room / row)))


def self_text(settings: Healing, tokenizer: Any, teacher: Any, fingerprint: str, report: Reporter) -> Tensor:
    """Rows [n, length] sampled from the teacher at temperature 1, from the assets' cache if they are there."""
    from huggingface_hub import cached_assets_path
    from safetensors.torch import load_file

    from transmla.export.files import write_tensors

    rows = -(-settings.self_tokens // settings.length)
    device = teacher.device.type
    at_once = _rows_at_once(teacher, settings.length)
    key = f"{fingerprint} {rows} {settings.length} {settings.seed} {device} {teacher.dtype} {at_once}"
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
            batch_size=at_once,
            progress=lambda done, _: report.advance(done),
        )
        write_tensors(file, {"tokens": tokens})
    return load_file(file)["tokens"]
