"""TransmlaError: the error that transmla raises for mistakes in a user's input."""

from __future__ import annotations


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
        parts = (" ".join(part.split()).removesuffix(".") for part in (what, limit, remedy))
        super().__init__("; ".join(part for part in parts if part))
