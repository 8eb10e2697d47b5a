"""Texts for training and evaluation, in the shares of a mixture. A batch depends only on its step number."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.heal.checks import check_amount
from transmla.heal.settings import Healing
from transmla.reporter import Reporter
from transmla.source.mixture import Part, beginnings, check_vocabulary, openings, parts_of, turns
from transmla.source.samples import sampled_rows
from transmla.source.text import SELF, load_tokens, start_token


class TokenStream:
    """An endless series of training sequences from one text, in a new order each epoch.

    Attributes:
        name: the text's name.
        share: the text's share of the training sequences.
        length: tokens per sequence.
        seed: seed of the orders.
        head: the tokens that every sequence begins with: BOS or none.
        tokens: the training tokens.
        held_out: the held-out sequences [held_out, length], which are never trained on.
        sequences: sequences per epoch.
    """

    def __init__(
        self,
        name: str,
        tokens: Tensor,
        *,
        length: int,
        held_out: int,
        seed: int,
        share: float = 1.0,
        bos: int | None = None,
    ) -> None:
        """Split a text into training and held-out tokens.

        Args:
            name: the text's name.
            tokens: one stream [N] without BOS, cut at another offset each epoch; or rows [n, length], which stay whole.
            length: tokens per sequence.
            held_out: sequences to hold out, taken from the end of the text.
            seed: seed of orders and offsets.
            share: the text's share of the training sequences.
            bos: token that is put before every sequence of a stream, or None.
        """
        self.name, self.length, self.seed, self.share = name, length, seed, share
        self._cached_epoch: tuple[int, tuple[int, Tensor]] | None = None
        self.head = tokens.new_tensor([bos] if bos is not None and tokens.dim() == 1 else [], dtype=torch.int64)
        self._body = length - len(self.head)
        held_out_size = held_out * self._body if tokens.dim() == 1 else held_out
        self.tokens, rows = tokens[:-held_out_size], tokens[-held_out_size:].reshape(held_out, -1)
        self.held_out = torch.cat([self.head.expand(held_out, -1), rows], 1)
        # A stream gives up one sequence, so that an epoch can start at any offset below its length.
        self.sequences = (len(self.tokens) // self._body - 1) if tokens.dim() == 1 else len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        """Return sequence ``index`` [length] of the endless series."""
        epoch, position = divmod(index, self.sequences)
        offset, order = self._epoch(epoch)
        row = int(order[position])
        if self.tokens.dim() == 2:
            return self.tokens[row]
        start = offset + row * self._body
        return torch.cat([self.head, self.tokens[start : start + self._body]])

    def _epoch(self, epoch: int) -> tuple[int, Tensor]:
        """Return the offset of the first cut and the order [sequences] of an epoch; the last result is cached."""
        if self._cached_epoch is None or self._cached_epoch[0] != epoch:
            self._cached_epoch = epoch, self._draw(epoch)
        return self._cached_epoch[1]

    def _draw(self, epoch: int) -> tuple[int, Tensor]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        offset = int(torch.randint(self._body, (1,), generator=generator))
        return offset, torch.randperm(self.sequences, generator=generator)


class Batches:
    """Batches of ``batch`` sequences from several texts, in their shares."""

    def __init__(self, texts: list[TokenStream], batch: int) -> None:
        self.texts, self.batch = texts, batch
        self._turns = turns([text.share for text in texts])
        # Text and index in this text of every sequence so far.
        self._sequences: list[tuple[int, int]] = []
        self._counts = [0] * len(texts)

    def __getitem__(self, step: int) -> Tensor:
        """Return the batch of ``step`` [batch, length]; the number of processes does not matter."""
        while len(self._sequences) < (step + 1) * self.batch:
            which = next(self._turns)
            self._sequences.append((which, self._counts[which]))
            self._counts[which] += 1
        chosen = self._sequences[step * self.batch : (step + 1) * self.batch]
        return torch.stack([self.texts[which][index] for which, index in chosen])

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


@dataclass(frozen=True)
class HealingTexts:
    """The texts of a healing, read before a model is loaded.

    Attributes:
        parts: the mixture.
        tokens: token ids [N] of every part but ``self`` by name, without BOS.
    """

    parts: tuple[Part, ...]
    tokens: dict[str, Tensor]


def read_texts(settings: Healing, tokenizer: Any, report: Reporter) -> HealingTexts:
    """Read all texts of ``settings`` but ``self``, before a model is loaded.

    Args:
        settings: names, shares and amounts of the texts.
        tokenizer: the teacher's tokenizer.
        report: receives the progress.

    Raises:
        TransmlaError: if a text cannot be read or is too short.
    """
    parts = parts_of(settings.data, tokenizer, split=settings.split, column=settings.column, report=report)
    bos = start_token(tokenizer)
    texts = {}
    for part in parts:
        if part.name == SELF:
            check_amount(SELF, settings.self_tokens, part.share, settings)
            continue
        report.stage(f"reading {part.name}", 1)
        limit = math.ceil(part.share * settings.max_tokens) + (settings.held_out + 2) * settings.length
        tokens = load_tokens(part.name, tokenizer, limit=limit, split=part.split, column=part.column)
        check_amount(part.name, tokens.numel(), part.share, settings)
        texts[part.name] = tokens if bos is None else tokens[1:]
        report.advance(1, f"{len(tokens):,} tokens")
    return HealingTexts(parts, texts)


def make_batches(
    settings: Healing,
    texts: HealingTexts,
    tokenizer: Any,
    teacher: Any,
    fingerprint: str,
    report: Reporter,
) -> Batches:
    """Return the batches of the mixture. The text ``self`` is sampled from ``teacher``, once for all runs.

    Args:
        settings: shares and amounts of the texts.
        texts: the texts, as ``read_texts`` returns them.
        tokenizer: the teacher's tokenizer.
        teacher: the model that ``self`` is sampled from.
        fingerprint: hash of the teacher's weights, which identifies the cached samples.
        report: receives the progress.

    Raises:
        TransmlaError: if a text holds a token outside the teacher's vocabulary.
    """
    bos = start_token(tokenizer)
    streams = []
    for part in texts.parts:
        if part.name == SELF:
            tokens = sampled_rows(
                teacher,
                tokenizer,
                openings(beginnings(texts.parts, tokenizer), tokenizer, seed=settings.seed),
                rows=-(-settings.self_tokens // settings.length),
                length=settings.length,
                seed=settings.seed,
                fingerprint=fingerprint,
                report=report,
            )
        else:
            tokens = texts.tokens[part.name]
        check_vocabulary(part.name, tokens, teacher.config.get_text_config().vocab_size)
        streams.append(
            TokenStream(
                part.name,
                tokens,
                length=settings.length,
                held_out=settings.held_out,
                seed=settings.seed,
                share=part.share,
                bos=bos,
            )
        )
    return Batches(streams, settings.batch)
