"""Read local files: plain text and tables, packed by gzip or not."""

from __future__ import annotations

import glob
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from transmla.boundary import check_regular
from transmla.errors import TransmlaError
from transmla.source.texts.rows import read_errors, row_texts

TEXT_SUFFIXES = (".txt", ".md")
# Suffix of a table → the reader of `datasets`.
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
KINDS = ", ".join((*TEXT_SUFFIXES, *TABLES))


def kind_of(path: Path) -> str:
    """Return the suffix that tells a file's kind; that of ``a.jsonl.gz`` is ``.jsonl``."""
    packed = path.suffix.lower() == ".gz"
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    # `datasets` does not unpack Parquet files, which are compressed inside.
    return ".gz" if packed and kind == ".parquet" else kind


def check_file(path: Path) -> None:
    """Check that ``path`` is a file of a known kind.

    Raises:
        TransmlaError: if it is a folder, missing, or of another kind.
    """
    if path.exists() and not path.is_dir():
        check_regular(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if kind_of(p) in (*TEXT_SUFFIXES, *TABLES))
        shown = ", ".join(inside[:5]) + (", …" if len(inside) > 5 else "")
        raise TransmlaError(
            f"'{path}' is a folder, not a text",
            limit=f"it holds {shown}" if inside else f"it holds no file of these kinds: {KINDS}",
            remedy="name one of its files" if inside else "name a file",
        )
    if not path.is_file():
        raise TransmlaError(f"no file {path}", remedy="check the path")
    if kind_of(path) not in (*TEXT_SUFFIXES, *TABLES):
        raise TransmlaError(
            f"{path} has an unknown file type", limit=f"supported: {KINDS}; all but .parquet also as .gz"
        )


def is_table(path: Path) -> bool:
    """Return whether a file has rows and columns."""
    return kind_of(path) in TABLES


def file_pieces(path: Path, column: str | None, tokenizer: Any) -> Iterator[str]:
    """Yield consecutive pieces of a file; rows of a table are separated by a blank line.

    Args:
        path: a file that ``check_file`` accepts.
        column: the table's column of texts or chats; None chooses it.
        tokenizer: renders chats.
    """
    return _rows(path, column, tokenizer) if is_table(path) else _chunks(path)


def _chunks(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with cast(IO[str], opener(path, "rt", encoding="utf-8")) as file:
            while chunk := file.read(1 << 20):
                yield chunk
    except UnicodeDecodeError as error:
        raise TransmlaError(f"{path} is not UTF-8 text", limit=str(error)) from error
    except (OSError, EOFError, zlib.error) as error:
        raise TransmlaError(f"{path} cannot be read", limit=str(error), remedy="check the file") from error


def _rows(path: Path, column: str | None, tokenizer: Any) -> Iterator[str]:
    if path.stat().st_size == 0:
        return
    from datasets import load_dataset

    with read_errors(str(path), remedy="check the file"):
        # `datasets` takes names for patterns: ``[1]`` would match ``1``, and ``*`` other files too.
        name = glob.escape(str(path))
        rows = load_dataset(TABLES[kind_of(path)], data_files=name, split="train", streaming=True)
        yield from row_texts(rows, column, str(path), tokenizer)
