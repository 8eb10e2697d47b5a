"""Text to tokens: the prose CPython ships, local files, Hub datasets, or the model's own samples."""

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

# Neighbouring blocks tell the same story; of a text this many times longer than needed, some of each part is taken.
SPREAD = 8
# Enough characters for nearly every text; when they are not, the prefix doubles.
CHARS_PER_TOKEN = 12
# Cutting a text can change the tokens next to the cut, never those this far before it.
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
    """Blocks of `length` tokens, in order and evenly spread over the text.

    Of a text longer than SPREAD times what is needed, its beginning is spread over; of one that is just long
    enough, the blocks follow each other. Takes what `load_tokens` takes; `remedy` is the advice given when the
    text is too short. Returns int64 [sequences, length]. Raises TransmlaError as `load_tokens` does, and for a
    short text.
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
    """The tokens of `source` as one stream, its first `limit` ones when given; only as much text is read.

    `source` is `pydoc` (splits train and test), a .txt or .md file (one document), a .jsonl, .json or
    .parquet file, or a Hub dataset id, "id:config" or an alias (`wikitext`, `c4`). Rows, taken from
    `column` ("text" by default), are joined by a blank line; `name` is the dataset's config, `split` is
    "train" by default. A tokenizer that starts texts with BOS puts one at the very start and no other.

    Returns int64 [N]. Raises TransmlaError for a source that is missing, unreadable, empty or
    unreachable, an unknown column, and an option that the source does not have.
    """
    tokens = _encode(_pieces(source, split, column, name), tokenizer, limit)
    if not tokens:
        raise TransmlaError(f"{source} holds no text", remedy="give a text that is not empty")
    return torch.tensor(tokens, dtype=torch.int64)


def _encode(pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase, limit: int | None) -> list[int]:
    """Tokens of the joined pieces, reading and tokenising a prefix that yields `limit` of them."""

    def tokenize(text: str, *, special: bool = False) -> list[int]:
        # verbose=False: a text longer than the model's context is meant to be, no warning.
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    bos = tokenizer.bos_token_id
    head = [bos] if bos is not None and tokenize("a", special=True)[:1] == [bos] else []
    wanted = sys.maxsize if limit is None else limit + CUT_MARGIN
    text, chars = "", CHARS_PER_TOKEN * wanted
    while True:
        parts = [text]
        size = len(text)
        while size < chars and (piece := next(pieces, None)) is not None:
            parts.append(piece)
            size += len(piece)
        text = "".join(parts)
        if size < chars:  # all there is
            return (head + tokenize(text))[:limit] if text.strip() else []
        # A line's end is where a cut disturbs the fewest tokens.
        tokens = tokenize(text[: text.rfind("\n", 0, chars) + 1 or chars])
        if len(tokens) >= wanted:
            return (head + tokens)[:limit]
        chars *= 2


def _pieces(source: str, split: str | None, column: str | None, name: str | None) -> Iterator[str]:
    """The text of `source` in consecutive pieces, read as they are asked for."""
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if source == "self":
        raise TransmlaError(
            "`self` is no text: sampling needs the model",
            remedy="give a file, a Hub dataset or `pydoc`",
        )
    if source == "pydoc":
        _refuse("pydoc", column=column, name=name)
        return iter([pydoc_text(split or "train")])
    if source in ALIASES or not (path.is_file() or suffix in (*TEXT_SUFFIXES, *TABLE_BUILDERS)):
        return _hub_rows(source, split or "train", column, name)
    if not path.is_file():
        raise TransmlaError(f"no file {source}", remedy="check the path")
    _refuse(source, split=split, name=name)
    if suffix in TEXT_SUFFIXES:
        _refuse(source, column=column)
        return _file_chunks(path)
    if suffix in TABLE_BUILDERS:
        return _table_rows(path, TABLE_BUILDERS[suffix], column)
    raise TransmlaError(
        f"{source} is of no type that can be read",
        limit=f"types: {', '.join((*TEXT_SUFFIXES, *TABLE_BUILDERS))}",
    )


def _refuse(source: str, **options: str | None) -> None:
    for option, value in options.items():
        if value is not None:
            raise TransmlaError(f"{source} has no {option} {value!r}", remedy=f"leave the {option} out")


def pydoc_text(split: str) -> str:
    """Every fifth topic is `test`, the others `train`; a paragraph that topics share appears once, in one."""
    if split not in ("train", "test"):
        raise TransmlaError(f"pydoc has no split {split!r}", remedy="choose train or test")
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = names[::5]
    chosen: dict[str, list[str]] = {"test": [], "train": []}
    seen: set[str] = set()
    # Topics quote each other, differing in footnote numbers, markup and indentation: compare letters alone.
    for name in held_out + [name for name in names if name not in held_out]:
        for paragraph in re.split(r"\n\s*\n", topics[name].strip("\n")):
            letters = "".join(filter(str.isalpha, paragraph)).lower()
            if letters not in seen:
                seen.add(letters)
                chosen["test" if name in held_out else "train"].append(paragraph)
    return "\n\n".join(chosen[split]) + "\n"


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

    with _readable(str(path), remedy="check the file"):
        rows = load_dataset(builder, data_files=str(path), split="train", streaming=True)
        yield from _column(rows, column, str(path))


def _hub_rows(source: str, split: str, column: str | None, name: str | None) -> Iterator[str]:
    from datasets import load_dataset

    path, _, config = source.partition(":")
    path, default = ALIASES.get(path, (path, None))
    with _readable(source, remedy=NO_NETWORK):
        rows = load_dataset(path, name or config or default, split=split, streaming=True)
        yield from _column(rows, column, source)


def _column(rows: Iterable[dict[str, Any]], column: str | None, source: str) -> Iterator[str]:
    column = column or "text"
    blank = ""
    for row in rows:
        if not isinstance(row.get(column, 0), str | None):
            what = f"a column {column!r} of text" if column in row else f"a column {column!r}"
            raise TransmlaError(f"{source} lacks {what}", limit=f"its columns: {', '.join(row)}")
        if row[column] is not None:
            yield blank + row[column]
            blank = "\n\n"


@contextmanager
def _readable(source: str, *, remedy: str) -> Iterator[None]:
    """Whatever `datasets` and the Hub client raise for a source that cannot be read, said in one line."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except TransmlaError:
        raise
    # Parsers, file systems and the HTTP client (httpx or httpx2, by version) share no narrower class.
    except Exception as error:
        if isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError):
            what = f"dataset {source}: the Hugging Face Hub could not be reached"
        elif isinstance(error, DatasetNotFoundError):
            what = f"{source} is neither a file here nor a dataset on the Hub that may be read"
        else:
            what = f"{source} cannot be read: {next(iter(str(error).splitlines()), type(error).__name__)}"
        raise TransmlaError(what, remedy=remedy) from error
