"""The one error a user is meant to read."""

from __future__ import annotations


class TransmlaError(Exception):
    """Bad input, said in one line: what is wrong, the limit it broke, and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, what: str, *, limit: str = "", remedy: str = "") -> None:
        self.what, self.limit, self.remedy = what, limit, remedy
        # A limit may quote a library, whose messages have lines and full stops of their own.
        parts = (" ".join(part.split()).removesuffix(".") for part in (what, limit, remedy))
        super().__init__("; ".join(part for part in parts if part))
