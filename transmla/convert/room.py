"""Whether memory and disk have room for a conversion, and the options with which they would."""

from __future__ import annotations

import math
import shutil
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from pathlib import Path

from transmla.convert.memory import FEWEST, SHORTEST, check_memory, holds_streams
from transmla.convert.prepare import Prepared
from transmla.errors import TransmlaError
from transmla.export.output import check_writable
from transmla.plan.estimate import disk_bytes


def check_room(prepared: Prepared, output: Path, text: tuple[int, int], *, written: int = 0) -> None:
    """Check that memory and disk have room for a conversion.

    Args:
        prepared: the conversion.
        output: folder of the export.
        text: number of calibration sequences, and tokens per sequence.
        written: bytes that an unfinished run has written.

    Raises:
        TransmlaError: if they certainly do not.
    """
    check_memory(prepared, *text)

    def needed(tokens: int) -> int:
        streams = 0 if holds_streams(prepared, tokens) else prepared.processes
        return disk_bytes(prepared.plan, tokens, prepared.fit, streams=streams) - written

    # A run that is resumed keeps its text.
    check_disk(output, needed(math.prod(text)), less=None if written else partial(_less_text, needed, text))


def check_disk(
    output: Path, needed: int, *, healing: bool = False, less: Callable[[int], str | None] | None = None
) -> None:
    """Check that the disk of ``output`` is writable and has the ``needed`` bytes free of a conversion or ``healing``.

    Args:
        output: folder to write.
        needed: bytes of the conversion or healing.
        healing: whether a healing needs them.
        less: returns the option with which a conversion fits the free bytes; None if no option does.

    Raises:
        TransmlaError: if it is not writable, or has too little space.
    """
    parent = check_writable(output)
    free = shutil.disk_usage(parent).free
    if free < needed:
        option = less(free) if less else None
        what, or_else = ("healing", "leave it out (--heal off), ") if healing else ("conversion", "")
        or_else = f"use {option}, " if option else or_else
        raise TransmlaError(
            f"the {what} needs about {needed / 1e9:.1f} GB of disk",
            limit=f"'{parent}' has {free / 1e9:.1f} GB free",
            remedy=f"free some disk space, {or_else}or choose another --output",
        )


def _less_text(needed: Callable[[int], int], text: tuple[int, int], free: int) -> str | None:
    """Return the options of the largest calibration text whose hidden states fit ``free`` bytes; None if none does.

    Args:
        needed: returns the bytes that a conversion with a number of calibration tokens needs.
        text: number of calibration sequences, and tokens per sequence.
        free: free bytes.
    """
    sequences, length = text
    fewer = bisect_right(range(1, sequences), free, key=lambda number: needed(number * length))
    if fewer >= FEWEST:
        return f"--calibration-sequences {fewer}"
    fewest = min(sequences, FEWEST)
    shorter = bisect_right(range(1, length), free, key=lambda number: needed(fewest * number))
    if shorter < SHORTEST:
        return None
    return (f"--calibration-sequences {fewest} " if fewest < sequences else "") + f"--calibration-length {shorter}"
