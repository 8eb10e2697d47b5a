"""Mixtures of texts: which texts, in what shares, as rows of tokens.

Every row starts with BOS where the tokenizer starts texts with it. The text ``self`` is sampled from the model, and
``auto`` is the default mixture: texts of several domains, and samples of the model that continue them.
"""

from __future__ import annotations

import itertools
import random
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transmla.errors import TransmlaError
from transmla.reporter import Reporter
from transmla.shares import percentages, shares
from transmla.source.openings import ENGLISH, LANGUAGES, PROMPTS
from transmla.source.text import (
    AUTO,
    SELF,
    load_blocks,
    load_excerpts,
    text_options,
    text_start,
)
from transmla.source.texts.hub import hub_is_reachable

# The chats of the default mixture.
CHATS = "ultrachat"
# The default mixture with and without a Hub. Entries without a weight share the rest equally.
WITH_HUB = (
    "self:0.4",
    "wikipedia-en",
    "pg19",
    "magicoder",
    CHATS,
    "pydoc:0.05",
    "wikipedia-de:0.025",
    "wikipedia-es:0.025",
    "wikipedia-fr:0.025",
    "wikipedia-zh:0.025",
)
WITHOUT_HUB = ("self:0.6", "stdlib", "packages", "pydoc:0.05")
# Tokens of a text that a sample continues, at least and at most.
SHORTEST_OPENING, LONGEST_OPENING = 8, 64
# Rows of one text that samples may continue.
MOST_BEGINNINGS = 256
# Fewest bytes per token at which a tokenizer serves a language. Byte by byte it would be 1.
SERVED = 2.0


@dataclass(frozen=True)
class Part:
    """One text of a mixture.

    Attributes:
        name: the text, as ``load_tokens`` takes it, or ``self``.
        share: its share of the rows; the shares of a mixture sum to 1.
        split: split of the text, or None.
        column: column of the text, or None.
    """

    name: str
    share: float
    split: str | None = None
    column: str | None = None


def parts_of(
    entries: Sequence[str],
    tokenizer: Any,
    *,
    split: str | None = None,
    column: str | None = None,
    report: Reporter,
    unsampled: str = "",
    rows: int | None = None,
) -> tuple[Part, ...]:
    """Return the parts of a mixture, with ``auto`` replaced by the texts that can be read here.

    Args:
        entries: ``NAME`` or ``NAME:WEIGHT`` of each text.
        tokenizer: the model's tokenizer. Without a chat template that can be used, ``auto`` has no chats.
        split: split of every text that has splits.
        column: column of every text that has columns.
        report: receives one line that says what ``auto`` is.
        unsampled: why the model cannot be sampled; ``auto`` then has no samples.
        rows: number of rows that the mixture is read as, whose shares are reported; None: not known, and the shares
            that were asked for are reported.

    Raises:
        TransmlaError: if ``split`` or ``column`` fits none of the texts, or if ``self`` is named and cannot be sampled.
    """
    parts: dict[str, Part] = {}
    why: str | None = None
    for name, share in shares(entries).items():
        if name == AUTO:
            hub = hub_is_reachable()
            left_out = () if _renders_chats(tokenizer) else (CHATS,)
            inner = shares([entry for entry in (WITH_HUB if hub else WITHOUT_HUB) if entry not in left_out])
            if unsampled:
                rest = 1 - inner.pop(SELF)
                inner = {text: share / rest for text, share in inner.items()}
            why = _why(hub=hub, unsampled=unsampled)
        elif name == SELF and unsampled:
            raise TransmlaError(
                "the source cannot be sampled",
                limit=unsampled,
                remedy="leave `self` out of --calibration, or convert where there is more memory",
            )
        else:
            inner = {name: 1.0}
        for text, part in inner.items():
            # A split or column that the user gives is meant for the texts that the user names.
            known = parts.get(text, Part(text, 0.0))
            if name != AUTO:
                takes = text_options(text)
                known = replace(
                    known, split=split if "split" in takes else None, column=column if "column" in takes else None
                )
            parts[text] = replace(known, share=known.share + share * part)
    check_options(entries, split=split, column=column)
    mixed = tuple(parts.values())
    if why is not None:
        report.message(f"auto text: {_describe(mixed, rows)}{why}")
    return mixed


def check_options(entries: Sequence[str], *, split: str | None, column: str | None) -> None:
    """Check that one of the texts that the user names takes the ``split``, and one the ``column``.

    Raises:
        TransmlaError: if none does.
    """
    for option, value in (("split", split), ("column", column)):
        if value is not None and not any(option in text_options(name) for name in shares(entries)):
            listed = ", ".join(shares(entries))
            raise TransmlaError(f"{listed} has no {option} {value!r}", remedy=f"leave the {option} out")


def _describe(parts: Sequence[Part], rows: int | None) -> str:
    """Return the texts of a mixture and their shares: of its ``rows``, or those that were asked for."""
    parted = {part.name: part.share for part in parts}
    if rows:
        counts = Counter(order(parts, rows))
        parted = {part.name: counts[i] / rows for i, part in enumerate(parts) if counts[i]}
    return ", ".join(f"{name} {share}" for name, share in percentages(parted).items())


def _why(*, hub: bool, unsampled: str) -> str:
    """Return in brackets why ``auto`` is the mixture that it is; empty if there is nothing to say."""
    why = [] if hub else ["the Hub is out of reach"]
    why += [f"no samples: {unsampled}"] if unsampled else [] if hub else ["self continues openings of many kinds"]
    return f" ({'; '.join(why)})" if why else ""


def order(parts: Sequence[Part], count: int) -> list[int]:
    """Return the part of each of ``count`` rows. Every run of rows holds the parts in nearly their shares.

    The last rows are one of each part that has a row. A fit holds out the last rows, and so judges on every part.
    """
    chosen = list(itertools.islice(turns([part.share for part in parts]), count))
    last = {part: row for row, part in enumerate(chosen)}
    return [part for row, part in enumerate(chosen) if row != last[part]] + sorted(last, key=lambda part: last[part])


def turns(shares_of_texts: Sequence[float]) -> Iterator[int]:
    """Yield endlessly which text supplies the next row: the one that is furthest behind its share."""
    taken = [0] * len(shares_of_texts)
    for i in itertools.count(1):
        due = [share * i - n for share, n in zip(shares_of_texts, taken, strict=True)]
        index = due.index(max(due))
        taken[index] += 1
        yield index


def read_rows(
    parts: Sequence[Part], tokenizer: Any, *, sequences: int, length: int, vocabulary: int
) -> dict[str, Tensor]:
    """Read the rows of every part but ``self``.

    Args:
        parts: the mixture.
        tokenizer: the model's tokenizer.
        sequences: rows of the whole mixture.
        length: tokens in a row.
        vocabulary: number of the model's embeddings.

    Returns:
        Token ids [rows, length] by name; parts without a row are missing.

    Raises:
        TransmlaError: if a text cannot be read, is too short for its share, or has a token outside the vocabulary.
    """
    chosen = order(parts, sequences)
    texts = {}
    for index, part in enumerate(parts):
        rows = chosen.count(index)
        if part.name == SELF or not rows:
            continue
        tokens = load_blocks(part.name, tokenizer, sequences=rows, length=length, split=part.split, column=part.column)
        check_vocabulary(part.name, tokens, vocabulary)
        texts[part.name] = tokens
    return texts


def check_vocabulary(name: str, tokens: Tensor, vocabulary: int) -> None:
    """Check that the model has an embedding for every token of a text.

    Raises:
        TransmlaError: if it has not.
    """
    if int(tokens.max()) >= vocabulary:
        raise TransmlaError(
            f"'{name}' holds token {int(tokens.max())}",
            limit=f"the model's vocabulary has {vocabulary} entries",
            remedy="use the tokenizer that belongs to this model",
        )


def interleave(parts: Sequence[Part], texts: Mapping[str, Tensor], sequences: int) -> Tensor:
    """Return the rows [sequences, length] of the mixture, in the order of ``order``."""
    rows = {name: iter(text) for name, text in texts.items()}
    return torch.stack([next(rows[parts[index].name]) for index in order(parts, sequences)])


def beginnings(parts: Sequence[Part], tokenizer: Any) -> dict[str, Tensor]:
    """Return rows of every text but ``self`` for samples to continue, spread over the text.

    The rows depend on the mixture alone, so a conversion and the healing after it can share their samples.

    Returns:
        Token ids [rows, tokens] by name. Rows start with BOS where the tokenizer starts texts with it.
    """
    head = torch.tensor(text_start(tokenizer), dtype=torch.int64)
    width, rows = 2 * LONGEST_OPENING, dict[str, Tensor]()
    for part in parts:
        if part.name != SELF:
            cut = load_excerpts(
                part.name, tokenizer, count=MOST_BEGINNINGS, length=width, split=part.split, column=part.column
            )
            rows[part.name] = torch.cat([head.expand(len(cut), -1), cut], 1)
    return rows


def openings(texts: Mapping[str, Tensor], tokenizer: Any, *, seed: int) -> list[list[int]]:
    """Return what samples begin with: beginnings of the given texts' rows in turn with openings of other kinds.

    Args:
        texts: token ids [rows, length] of the texts to continue, by name; may be empty.
        tokenizer: the model's tokenizer. Its chat template, if any, renders questions of a user.
        seed: seed of the order and of the lengths.
    """
    generator = random.Random(seed)
    head = text_start(tokenizer)
    written = [head + tokens for tokens in _written(tokenizer)]
    generator.shuffle(written)
    real = []
    for row in (row for rows in zip(*_equally_many(texts), strict=True) for row in rows):
        tokens = row.tolist()
        longest = max(1, min(LONGEST_OPENING, len(tokens) // 2))
        cut = generator.randint(min(SHORTEST_OPENING, longest), longest)
        start = generator.randrange(len(head), len(tokens) - cut + 1)
        real.append(head + tokens[start : start + cut])
    if not written or not real:
        return written or real
    return [opening for pair in zip(_cycled(written, len(real)), real, strict=False) for opening in pair]


def _equally_many(texts: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """Return the rows of every text; those of shorter texts are repeated."""
    most = max((len(rows) for rows in texts.values()), default=0)
    return [_cycled(list(rows), most) for rows in texts.values()]


def _cycled(items: list[Any], count: int) -> list[Any]:
    return [items[i % len(items)] for i in range(max(count, len(items)))]


def _written(tokenizer: Any) -> list[list[int]]:
    """Return the tokens of the openings in the languages that the tokenizer serves, and of the users' questions."""
    texts = [text for text in ENGLISH if _is_kept(text, tokenizer)]
    for language in LANGUAGES.values():
        if _is_served(language, tokenizer):
            texts += language
    return [tokens for tokens in (_tokenize(text, tokenizer) for text in (*texts, *_chats(tokenizer))) if tokens]


def _chats(tokenizer: Any) -> list[str]:
    """Return the users' questions as chats; none without a chat template, or if the template refuses a question."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    prompts = [p for p in PROMPTS if _is_kept(p, tokenizer) and (p.isascii() or _is_served([p], tokenizer))]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    try:
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    except Exception:  # a template raises what it likes, for example if a chat has no message of the system
        return []
    return [text.removeprefix(tokenizer.bos_token or "") for text in texts]


def _renders_chats(tokenizer: Any) -> bool:
    """Return whether the tokenizer has a chat template, and the template renders a question and its answer."""
    chat = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    try:
        return bool(tokenizer.chat_template and tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # as in `_chats`
        return False


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _is_served(texts: Sequence[str], tokenizer: Any) -> bool:
    """Return whether the tokenizer keeps texts of one language and needs few tokens for them."""
    count = sum(len(_tokenize(text, tokenizer)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    return size >= SERVED * count and all(_is_kept(text, tokenizer) for text in texts)


def _is_kept(text: str, tokenizer: Any) -> bool:
    """Return whether the tokens of a text decode to its letters and digits. Small vocabularies lack some."""
    decoded = tokenizer.decode(_tokenize(text, tokenizer))
    return _letters(text) == _letters(decoded)


def _letters(text: str) -> str:
    """Return the letters and digits of a text in one form, because tokenizers may compose or decompose them."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", text.casefold())))
