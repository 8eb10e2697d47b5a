"""Read text as tokens: from CPython's ``pydoc`` topics, local files or Hub datasets."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transmla.errors import TransmlaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALIASES = {"wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "c4": ("allenai/c4", "en")}
TEXT_SUFFIXES = (".txt", ".md")
TABLE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
NO_NETWORK = "a local .txt, .jsonl or .parquet file, or `pydoc`, needs no network"
SHORTEN = "lower --calibration-sequences or --calibration-length, or give a longer text"

# Blocks are spread over this many times the tokens that they hold, because neighbouring blocks are alike.
SPREAD = 8
# First guess of the characters that a token needs; more than nearly every text needs. If too few, the prefix doubles.
CHARS_PER_TOKEN = 12
# Tokens before a cut that are thrown away: cutting a text may change the tokens near the cut.
CUT_MARGIN = 64


def load_blocks(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int,
    length: int,
    split: str | None = None,
    column: str | None = None,
    name: str | None = None,
    remedy: str = SHORTEN,
) -> Tensor:
    """Return blocks of consecutive tokens, in order and evenly spread over a text.

    Only the beginning of a long text is used: ``SPREAD`` times the tokens that the blocks hold. In a text that is just
    long enough, the blocks follow each other without a gap.

    Args:
        source: the text, as ``load_tokens`` takes it.
        tokenizer: the tokenizer of the model that reads the blocks.
        sequences: number of blocks.
        length: tokens in a block.
        split: split of the text, as ``load_tokens`` takes it.
        column: column of a table, as ``load_tokens`` takes it.
        name: config of a Hub dataset, as ``load_tokens`` takes it.
        remedy: advice in the error message when the text is too short.

    Returns:
        Token ids [sequences, length], int64.

    Raises:
        TransmlaError: if the text is too short or cannot be read.
    """
    if sequences < 1 or length < 1:
        raise TransmlaError(f"{sequences} sequences of {length} tokens", limit="both must be at least 1")
    needed = sequences * length
    tokens = load_tokens(source, tokenizer, limit=SPREAD * needed, split=split, column=column, name=name)
    if len(tokens) < needed:
        raise TransmlaError(
            f"{source} has {len(tokens)} tokens",
            limit=f"{sequences} sequences of {length} tokens need {needed}",
            remedy=remedy,
        )
    starts = torch.arange(sequences) * (len(tokens) - length) // max(1, sequences - 1)
    return tokens[starts[:, None] + torch.arange(length)]


def load_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    split: str | None = None,
    column: str | None = None,
    name: str | None = None,
) -> Tensor:
    """Return the tokens of a text as one sequence. No more of the text is read than ``limit`` tokens need.

    The rows of a table or dataset are joined by a blank line. If the tokenizer starts a text with BOS, the sequence
    starts with one BOS and has no other.

    Args:
        source: ``pydoc`` (with splits train and test); a .txt or .md file (one document); a .jsonl, .json or .parquet
            file; or a Hub dataset: its id, "id:config", or an alias (``wikitext``, ``c4``).
        tokenizer: the tokenizer of the model that reads the tokens.
        limit: number of tokens to return, from the beginning of the text; all tokens if None.
        split: split of ``pydoc`` or of a Hub dataset; "train" if None.
        column: column of a table or dataset that holds the text; "text" if None.
        name: config of a Hub dataset.

    Returns:
        Token ids [N], int64.

    Raises:
        TransmlaError: if the source is missing, unreadable, empty or unreachable, if it has no such column, or if an
            option does not apply to it.
    """
    tokens = _encode(_text_pieces(source, split, column, name), tokenizer, limit)
    if not tokens:
        raise TransmlaError(f"{source} holds no text", remedy="give a text that is not empty")
    return torch.tensor(tokens, dtype=torch.int64)


def _encode(pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase, limit: int | None) -> list[int]:
    """Return the first ``limit`` tokens of the joined pieces. Only a prefix is read and tokenised."""

    def tokenize(text: str) -> list[int]:
        # verbose=False: no warning that the text is longer than the model's context.
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

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


def text_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens before every text: ``[BOS]`` if the tokenizer adds it, else no token."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _text_pieces(source: str, split: str | None, column: str | None, name: str | None) -> Iterator[str]:
    """Return an iterator over consecutive pieces of a text, which reads each piece on demand."""
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if source == "self":
        raise TransmlaError(
            "the text `self` is only for calibration: sampling needs the model",
            remedy="give a file, a Hub dataset or `pydoc`",
        )
    if source == "pydoc":
        _refuse_options("pydoc", column=column, name=name)
        return iter([pydoc_text(split or "train")])
    if source in ALIASES or not (path.is_file() or suffix in (*TEXT_SUFFIXES, *TABLE_BUILDERS)):
        return _hub_rows(source, split or "train", column, name)
    if not path.is_file():
        raise TransmlaError(f"no file {source}", remedy="check the path")
    _refuse_options(source, split=split, name=name)
    if suffix in TEXT_SUFFIXES:
        _refuse_options(source, column=column)
        return _file_chunks(path)
    if suffix in TABLE_BUILDERS:
        return _table_rows(path, TABLE_BUILDERS[suffix], column)
    raise TransmlaError(
        f"{source} has an unknown file type",
        limit=f"supported: {', '.join((*TEXT_SUFFIXES, *TABLE_BUILDERS))}",
    )


def _refuse_options(source: str, **options: str | None) -> None:
    for option, value in options.items():
        if value is not None:
            raise TransmlaError(f"{source} has no {option} {value!r}", remedy=f"leave the {option} out")


def pydoc_text(split: str) -> str:
    """Return one split of CPython's help topics, with every paragraph once.

    In alphabetical order, every fifth topic belongs to the ``test`` split, the others to ``train``. A paragraph that
    occurs in both splits belongs to ``test``.

    Raises:
        TransmlaError: if ``split`` is not ``train`` or ``test``.
    """
    if split not in ("train", "test"):
        raise TransmlaError(f"pydoc has no split {split!r}", remedy="choose train or test")
    from pydoc_data.topics import topics

    names = sorted(topics)
    test_names = names[::5]
    paragraphs: dict[str, list[str]] = {"test": [], "train": []}
    known: set[str] = set()
    # Compare letters only: topics quote each other with other footnote numbers, markup and indentation.
    for name in test_names + [name for name in names if name not in test_names]:
        for paragraph in re.split(r"\n\s*\n", topics[name].strip("\n")):
            letters = "".join(filter(str.isalpha, paragraph)).lower()
            if letters not in known:
                known.add(letters)
                paragraphs["test" if name in test_names else "train"].append(paragraph)
    return "\n\n".join(paragraphs[split]) + "\n"


def _file_chunks(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            while chunk := file.read(1 << 20):
                yield chunk
    except UnicodeDecodeError as error:
        raise TransmlaError(f"{path} is not UTF-8 text", limit=str(error)) from error


def _table_rows(path: Path, builder: str, column: str | None) -> Iterator[str]:
    if path.stat().st_size == 0:
        return
    from datasets import load_dataset

    with _read_errors(str(path), remedy="check the file"):
        rows = load_dataset(builder, data_files=str(path), split="train", streaming=True)
        yield from _column(rows, column, str(path))


def _hub_rows(source: str, split: str, column: str | None, name: str | None) -> Iterator[str]:
    from datasets import load_dataset

    path, _, config = source.partition(":")
    path, default = ALIASES.get(path, (path, None))
    with _read_errors(source, remedy=NO_NETWORK):
        rows = load_dataset(path, name or config or default, split=split, streaming=True)
        yield from _column(rows, column, source)


def _column(rows: Iterable[dict[str, Any]], column: str | None, source: str) -> Iterator[str]:
    column = column or "text"
    separator = ""
    for row in rows:
        if not isinstance(row.get(column, 0), str | None):
            what = f"text column {column!r}" if column in row else f"column {column!r}"
            raise TransmlaError(f"{source} has no {what}", limit=f"its columns: {', '.join(row)}")
        if row[column] is not None:
            yield separator + row[column]
            separator = "\n\n"


@contextmanager
def _read_errors(source: str, *, remedy: str) -> Iterator[None]:
    """Convert the errors of ``datasets`` and of the Hub client into a ``TransmlaError`` of one line."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except TransmlaError:
        raise
    # The errors of parsers, file systems and the HTTP client (httpx or httpx2, by version) share no narrower class.
    except Exception as error:
        if isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError):
            what = f"dataset {source}: the Hugging Face Hub could not be reached"
        elif isinstance(error, DatasetNotFoundError):
            what = f"{source} is neither a local file nor a dataset on the Hub that this account may read"
        else:
            what = f"{source} cannot be read: {next(iter(str(error).splitlines()), type(error).__name__)}"
        raise TransmlaError(what, remedy=remedy) from error
