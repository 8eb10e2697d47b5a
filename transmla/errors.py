"""TransmlaError: the error that transmla raises for mistakes in a user's input; and what a printed text may hold."""

from __future__ import annotations

import re
import unicodedata

# Characters of a part of a message that are kept. Names and values of a damaged file may be of any length.
LONGEST = 2000
# Secrets in addresses: user and password, a token as a parameter, and access tokens of the Hub.
_SECRETS = (
    (re.compile(r"(?<=://)[^/\s@]+@"), "***@"),
    (re.compile(r"([?&;](?:[\w-]*token|[\w-]*key|password|signature)=)[^&\s'\"]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_***"),
)
# Invisible characters that change the direction of text, and separators of lines.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


# Requirements of optional packages by the module that is imported, as pyproject.toml has them.
REQUIREMENTS = {
    "gguf": "gguf>=0.17",
    "lm_eval": "lm-eval>=0.4.13",
    "matplotlib": "matplotlib>=3.9",
    "peft": "peft>=0.17",
}


class TransmlaError(Exception):
    """A mistake in the user's input, explained in one line.

    The message joins the three parts with semicolons and leaves out empty parts. The command line prints the message
    without a traceback and exits with code 2.

    Args:
        what: what is wrong.
        limit: the limit that the input exceeds, or the values that are allowed.
        remedy: what the user can do.
    """

    def __init__(self, what: str, *, limit: str = "", remedy: str = "") -> None:
        self.what, self.limit, self.remedy = what, limit, remedy
        # The limit may quote a library's message, which can have several lines and a final full stop.
        parts = (_clipped(printable(" ".join(part.split()))).removesuffix(".") for part in (what, limit, remedy))
        super().__init__("; ".join(part for part in parts if part))


def missing_package(what: str, module: str, *, limit: str = "it is not installed") -> TransmlaError:
    """Return the error for an optional package that is missing, with the command that installs the package.

    Args:
        what: what needs the package.
        module: the package's module, a key of ``REQUIREMENTS``.
        limit: replaces the words that the package is not installed.
    """
    return TransmlaError(what, limit=limit, remedy=f'pip install "{REQUIREMENTS[module]}"')


def printable(text: str) -> str:
    """Return ``text`` without secrets of addresses, and with control characters written as escapes.

    Names in files may hold anything. Printed as they are, they could move the cursor or recolour the terminal. Line
    feeds stay.
    """
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(_escaped(char) if _is_control(char) else char for char in text)


def _is_control(char: str) -> bool:
    return (unicodedata.category(char) in ("Cc", "Cs") and char != "\n") or char in _DIRECTIONS


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
