"""The texts of an evaluation: check their names and options, then read and cut them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transmla.errors import TransmlaError
from transmla.evaluate.windows import Windows, check_stride, cut_windows, tokens_needed
from transmla.recipe import Evaluation
from transmla.source.text import AUTO, SELF, check_text, load_tokens, named_texts, start_token, text_options
from transmla.source.texts.base import TEST

# Splits that conversions do not calibrate on by default. The named texts of this machine all have a test split.
HELD_OUT = {"wikitext": "test", "c4": "validation"}


@dataclass(frozen=True)
class Text:
    """A text of an evaluation.

    Attributes:
        name: the text, as ``load_tokens`` takes it.
        split: its split, or None if it has none.
        windows: the windows to evaluate.
    """

    name: str
    split: str | None
    windows: Windows


def check_texts(settings: Evaluation) -> None:
    """Check the names, files and options of the texts and the stride, before anything is read.

    Raises:
        TransmlaError: if a text is sampled from a model, a file is missing, no text takes an option, or the stride
            exceeds the window.
    """
    check_stride(settings.window, settings.stride)
    if sampled := [name for name in settings.text if name in (SELF, AUTO)]:
        raise TransmlaError(
            f"the text '{sampled[0]}' is no text to evaluate on",
            limit="a model is evaluated on text that it has not written",
            remedy=f"give a file, a Hub dataset or one of: {', '.join(named_texts())}",
        )
    takers = {"split": f"{', '.join(named_texts())} and Hub datasets", "column": "tables and Hub datasets"}
    for option, kinds in takers.items():
        value = getattr(settings, option)
        if value is not None and not any(option in text_options(name) for name in settings.text):
            names = ", ".join(settings.text)
            raise TransmlaError(
                f"{names} has no {option} {value!r}",
                limit=f"only {kinds} have a {option}",
                remedy=f"leave the {option} out",
            )
    for name in settings.text:
        check_text(name)


def _held_out(name: str) -> str | None:
    """Return the split that is evaluated if none is named; None leaves the choice to the dataset."""
    return TEST if name in named_texts() else HELD_OUT.get(name)


def read_texts(settings: Evaluation, tokenizer: Any) -> list[Text]:
    """Read the texts of an evaluation, and cut them into windows.

    ``split`` and ``column`` apply to the texts that take them. Where the tokenizer starts texts with BOS, every window
    starts with BOS.

    Raises:
        TransmlaError: if ``check_texts`` refuses the settings, or a text cannot be read or has fewer than 2 tokens.
    """
    check_texts(settings)
    bos = start_token(tokenizer)
    needed = tokens_needed(settings.window, settings.stride, settings.max_windows, bos)
    texts = []
    for name in settings.text:
        options = text_options(name)
        split = settings.split or _held_out(name) if "split" in options else None
        column = settings.column if "column" in options else None
        tokens = load_tokens(name, tokenizer, limit=needed, split=split, column=column)
        if len(tokens) < 2:
            raise TransmlaError(
                f"{name} has {len(tokens)} token",
                limit="an evaluation predicts a token from those before it, and needs at least 2",
                remedy="give a longer text",
            )
        windows = cut_windows(
            tokens, settings.window, stride=settings.stride, max_windows=settings.max_windows, bos=bos
        )
        texts.append(Text(name, split, windows))
    return texts
