"""Read text as tokens: from the shelf of named texts, local files or Hub datasets."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from transmla.boundary import boundary, local_path
from transmla.errors import TransmlaError
from transmla.registry import scan
from transmla.source.texts.base import TEST, TRAIN, NamedText
from transmla.source.texts.files import TABLES, TEXT_SUFFIXES, check_file, file_pieces, is_table, kind_of
from transmla.source.texts.hub import ALIASES, hub_pieces

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# Texts that only a conversion or a healing can make: samples of the model, and the default mixture.
SELF, AUTO = "self", "auto"
SHORTEN = "lower --calibration-sequences or --calibration-length, or give a longer text"

# Blocks are spread over this many times the tokens that they hold, because neighbouring blocks are alike.
SPREAD = 8
# First guess of the characters that a token needs. English prose needs 4 to 5, code 3. If too few, the prefix doubles.
CHARS_PER_TOKEN = 5
# Tokens before a cut that are thrown away: cutting a text may change the tokens near the cut.
CUT_MARGIN = 64
# Characters in the chunks of a long text, which are tokenised in parallel, and where a chunk may begin.
CHUNK, LINE_START = 2**16, re.compile(r"(?<=\S\n)(?=\w)")


def load_blocks(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int,
    length: int,
    split: str | None = None,
    column: str | None = None,
) -> Tensor:
    """Return blocks of consecutive tokens, in order and evenly spread over a text.

    Every block starts with BOS where the tokenizer starts texts with it.

    Only the beginning of a long text is used: ``SPREAD`` times the tokens that the blocks hold. In a text that is just
    long enough, the blocks follow each other without a gap.

    Args:
        source: the text, as ``load_tokens`` takes it.
        tokenizer: the tokenizer of the model that reads the blocks.
        sequences: number of blocks.
        length: tokens in a block.
        split: split of the text, as ``load_tokens`` takes it.
        column: column of a table, as ``load_tokens`` takes it.

    Returns:
        Token ids [sequences, length], int64.

    Raises:
        TransmlaError: if the text is too short or cannot be read.
    """
    import torch

    if sequences < 1 or length < 1:
        raise TransmlaError(f"{sequences} sequences of {length} tokens", limit="both must be at least 1")
    bos = start_token(tokenizer)
    head = [] if bos is None or length == 1 else [bos]
    body = length - len(head)
    needed = sequences * body
    tokens = load_tokens(source, tokenizer, limit=SPREAD * needed + len(head), split=split, column=column)
    tokens = tokens[len(head) :]
    if len(tokens) < needed:
        raise TransmlaError(
            f"{source} has {len(tokens):,} tokens, {needed - len(tokens):,} too few",
            limit=f"{sequences} sequences of {length} tokens need {needed:,}",
            remedy=SHORTEN,
        )
    starts = torch.arange(sequences) * (len(tokens) - body) // max(1, sequences - 1)
    blocks = tokens[starts[:, None] + torch.arange(body)]
    return torch.cat([torch.tensor(head, dtype=torch.int64).expand(sequences, -1), blocks], 1)


def load_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    split: str | None = None,
    column: str | None = None,
) -> Tensor:
    """Return the tokens of a text as one sequence. No more of the text is read than ``limit`` tokens need.

    The rows of a table or dataset are joined by a blank line. If the tokenizer starts a text with BOS, the sequence
    starts with one BOS and has no other.

    Args:
        source: a named text of the shelf (``pydoc``, ``stdlib``, ``packages``; with splits train and test); a .txt or
            .md file (one document); a .jsonl, .json, .csv or .parquet file; either also as .gz; or a Hub dataset: its
            id, "id:config", or an alias (``wikitext``, ``c4``, …).
        tokenizer: the tokenizer of the model that reads the tokens.
        limit: number of tokens to return, from the beginning of the text; all tokens if None.
        split: split of a named text or of a Hub dataset; "train", or the alias's, if None.
        column: column of a table or dataset that holds the text or chats; None chooses it.

    Returns:
        Token ids [N], int64.

    Raises:
        TransmlaError: if the source is missing, unreadable, empty or unreachable, if it has no such column, or if an
            option does not apply to it.
    """
    import torch

    tokens = _encode(_text_pieces(source, split, column, tokenizer), tokenizer, limit)
    if not tokens:
        raise TransmlaError(f"{source} holds no text", remedy="give a text that is not empty")
    return torch.tensor(tokens, dtype=torch.int64)


def load_excerpts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    split: str | None = None,
    column: str | None = None,
) -> Tensor:
    """Return short excerpts of a text, spread over ``SPREAD`` times the tokens that they hold.

    Only the excerpts are tokenised. An excerpt begins where a line does, if lines are short, and has no BOS.

    Args:
        source: the text, as ``load_tokens`` takes it.
        tokenizer: the tokenizer of the model that reads the excerpts.
        count: largest number of excerpts.
        length: tokens in each excerpt.
        split: as in ``load_tokens``.
        column: as in ``load_tokens``.

    Returns:
        Token ids [excerpts, length], int64. A short text is tokenised as a whole, and gives the excerpts that it holds;
        one that is shorter than ``length`` tokens gives one excerpt of all its tokens.

    Raises:
        TransmlaError: as ``load_tokens``.
    """
    import torch

    chars, parts, size = CHARS_PER_TOKEN * SPREAD * count * length, list[str](), 0
    for piece in _text_pieces(source, split, column, tokenizer):
        parts.append(piece)
        size += len(piece)
        if size >= chars:
            break
    text, needed = "".join(parts)[:chars], 2 * CHARS_PER_TOKEN * length
    if len(text) >= count * needed:
        places = [i * (len(text) - needed) // count for i in range(count)]
        lines = [text.find("\n", place, place + needed) + 1 or place for place in places]
        rows = [row[:length] for row in _encode_all([text[i : i + needed] for i in lines], tokenizer)]
        rows = [row for row in rows if len(row) == length]
        if rows:
            return torch.tensor(rows, dtype=torch.int64)
    tokens = _tokenize(text, tokenizer)
    if not tokens:
        raise TransmlaError(f"{source} holds no text", remedy="give a text that is not empty")
    whole = tokens[: max(1, len(tokens) // length) * length]
    cut = torch.tensor(whole, dtype=torch.int64).view(-1, min(length, len(tokens)))
    return cut[:: max(1, len(cut) // count)][:count]


def start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS token if the tokenizer starts every text with it, else None."""
    bos: int | None = tokenizer.bos_token_id
    starts = bos is not None and list(tokenizer("a", add_special_tokens=True)["input_ids"])[:1] == [bos]
    return bos if starts else None


def _encode(pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase, limit: int | None) -> list[int]:
    """Return the first ``limit`` tokens of the joined pieces. Only a prefix is read and tokenised."""

    def tokenize(text: str) -> list[int]:
        return _tokenize(text, tokenizer)

    head = text_start(tokenizer)
    needed = sys.maxsize if limit is None else limit + CUT_MARGIN
    text, chars = "", CHARS_PER_TOKEN * needed
    while True:
        parts = [text]
        size = len(text)
        while size < chars and (piece := next(pieces, None)) is not None:
            parts.append(piece)
            size += len(piece)
        text = "".join(parts)
        if size < chars:  # the whole text
            return (head + tokenize(text))[:limit] if text.strip() else []
        # Cut at the end of a line, where a cut changes the fewest tokens.
        tokens = tokenize(text[: text.rfind("\n", 0, chars) + 1 or chars])
        if len(tokens) >= needed:
            return (head + tokens)[:limit]
        chars *= 2


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text without special tokens. Chunks of a long text are tokenised in parallel."""
    chunks = _chunks(text)
    if len(chunks) <= 2:  # a check of two chunks takes as long as the whole
        return _encode_all([text], tokenizer)[0]
    # Some tokenizers put a space before every text they are given; they get the text as a whole.
    joined, apart = _encode_all([chunks[0] + chunks[1]], tokenizer), _encode_all(chunks[:2], tokenizer)
    if joined[0] != list(chain(*apart)):
        chunks = [text]
    return list(chain(*_encode_all(chunks, tokenizer)))


def _encode_all(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of every text, without special tokens."""
    with boundary(
        "the tokenizer cannot encode the text", remedy="correct the tokenizer's files, or choose another text"
    ):
        # verbose=False: no warning that the text is longer than the model's context.
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]


def _chunks(text: str) -> list[str]:
    """Cut a text into chunks of about CHUNK characters.

    A chunk begins with a line that begins with a letter or the like, and the line before is not blank: tokenizers of
    GPT-2's kind join blank lines at the end of a text, but not before a word.
    """
    cuts, start = [0], CHUNK
    while start < len(text) and (found := LINE_START.search(text, start)):
        cuts.append(found.start())
        start = found.start() + CHUNK
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def check_text(source: str) -> None:
    """Check that the file that a text means is there, and that no word follows a named text. Nothing is read.

    Raises:
        TransmlaError: as ``check_file``, or if a text such as ``pydoc:abc`` is none.
    """
    _refuse_suffix(source)
    if (file := text_file(source)) is not None:
        check_file(file)


def _refuse_suffix(source: str) -> None:
    """Check that no word follows the name of a text that has no configurations, such as ``pydoc:abc``.

    Raises:
        TransmlaError: if one does.
    """
    name, colon, word = source.partition(":")
    if colon and name in (SELF, AUTO, *named_texts()) and not local_path(source).exists():
        raise TransmlaError(
            f"'{source}' is no text",
            limit=f"'{word}' is not the weight of a text, and `{name}` has no configurations",
            remedy=f"give `{name}`, or `{name}:0.5` for half of a mixture",
        )


def named_texts() -> dict[str, NamedText]:
    """Return the named texts of the shelf by name."""
    return scan("transmla.source.texts", "TEXT")


def text_options(source: str) -> frozenset[str]:
    """Return the options that a text takes, of ``split`` and ``column``."""
    if source in (SELF, AUTO):
        return frozenset()
    if source in named_texts():
        return frozenset({"split"})
    if _is_file(source):
        return frozenset({"column"} if is_table(Path(source)) else ())
    return frozenset({"split", "column"})


def text_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens before every text: ``[BOS]`` if the tokenizer adds it, else no token."""
    bos = start_token(tokenizer)
    return [] if bos is None else [bos]


def _text_pieces(
    source: str, split: str | None, column: str | None, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Return an iterator over consecutive pieces of a text, which reads each piece on demand."""
    path = local_path(source)
    named = named_texts()
    _refuse_suffix(source)
    if source in (SELF, AUTO):
        raise TransmlaError(
            f"the text `{source}` is only for calibration and healing",
            limit="it is sampled from the model" if source == SELF else "it holds samples of the model",
            remedy=f"give a file, a Hub dataset or one of: {', '.join(named)}",
        )
    if source in named:
        _refuse_options(source, column=column)
        if split not in (None, TRAIN, TEST):
            raise TransmlaError(f"{source} has no split {split!r}", remedy="choose train or test")
        return iter(named[source].pieces(split or TRAIN))
    if _is_file(source):
        check_file(path)
        _refuse_options(source, split=split)
        if not is_table(path):
            _refuse_options(source, column=column)
        return file_pieces(path, column, tokenizer)
    return hub_pieces(source, split, column, tokenizer)


def text_file(source: str) -> Path | None:
    """Return the path of the file that a text means, which may be missing; None if the text is a name."""
    return local_path(source) if source not in (SELF, AUTO) and _is_file(source) else None


def _is_file(source: str) -> bool:
    """Return whether ``source`` means a local file rather than a name."""
    path = local_path(source)
    named = source in ALIASES or source in named_texts()
    return not named and (path.exists() or kind_of(path) in (*TEXT_SUFFIXES, *TABLES))


def _refuse_options(source: str, **options: str | None) -> None:
    for option, value in options.items():
        if value is not None:
            raise TransmlaError(f"{source} has no {option} {value!r}", remedy=f"leave the {option} out")
