"""Texts of the rows of a table: a column of text, or chats through the tokenizer's template."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transmla.errors import TransmlaError

# Columns that are taken if none is named, the first that a table has.
TEXT_COLUMNS = ("text", "content", "messages", "conversations")
NAME_A_COLUMN = "name a column of text or chats with --calibration-column, --eval-column or --column"
# Logger that prints an error of a JSON file which `datasets` then raises.
JSON_LOGGER = "datasets.packaged_modules.json.json"
# Names of a message's fields in ShareGPT's format, and what they are called in chat templates.
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def row_texts(rows: Iterable[dict[str, Any]], column: str | None, source: str, tokenizer: Any) -> Iterator[str]:
    """Yield the text of every row that has one, with a blank line between rows.

    Args:
        rows: the rows of a table, column → value.
        column: column of texts, or of chats (lists of messages); None takes the first of ``TEXT_COLUMNS``.
        source: the table's name, for errors.
        tokenizer: its template renders chats.

    Raises:
        TransmlaError: if there is no such column, its values are neither texts nor chats, or the tokenizer has no chat
            template.
    """
    separator = ""
    for row in rows:
        name = column or next((c for c in TEXT_COLUMNS if c in row), TEXT_COLUMNS[0])
        value = row.get(name, 0)
        if isinstance(value, list):
            value = _render(value, source, name, tokenizer) if value else None
        if not isinstance(value, str | None):
            what = f"text column {name!r}" if name in row else f"column {name!r}"
            raise TransmlaError(f"{source} has no {what}", limit=f"its columns: {', '.join(row)}", remedy=NAME_A_COLUMN)
        if value is not None:
            yield separator + value
            separator = "\n\n"


def _render(messages: list[Any], source: str, column: str, tokenizer: Any) -> str:
    """Return one chat as text, without the BOS that a template may begin with."""
    if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() | {_alias(k) for k in m} for m in messages):
        raise TransmlaError(
            f"{source}: column {column!r} holds lists that are not chats",
            limit="a chat is a list of messages with `role` and `content`",
            remedy=NAME_A_COLUMN,
        )
    if not getattr(tokenizer, "chat_template", None):
        raise TransmlaError(
            f"{source} holds chats, but this model's tokenizer has no chat template",
            limit="chats are rendered as the model was trained to read them",
            remedy="give text instead of chats, or add chat_template.jinja to the model's folder",
        )
    chat = [{_alias(key): value for key, value in message.items()} for message in messages]
    chat = [message | {"role": ROLES.get(message["role"], message["role"])} for message in chat]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception as error:  # a template raises what it likes, for example if roles do not alternate
        raise TransmlaError(
            f"{source}: the tokenizer's chat template refuses a chat", limit=first_line(error)
        ) from error
    return text.removeprefix(tokenizer.bos_token or "")


def _alias(key: str) -> str:
    return {"from": "role", "value": "content"}.get(key, key)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or the error's type if there is no text."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def read_errors(source: str, *, remedy: str) -> Iterator[None]:
    """Convert the errors of ``datasets`` and of the Hub client into a ``TransmlaError`` of one line."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import LocalEntryNotFoundError

    logger = logging.getLogger(JSON_LOGGER)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
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
            what = f"{source} cannot be read: {first_line(error)}"
        raise TransmlaError(what, remedy=remedy) from error
    finally:
        logger.setLevel(level)
