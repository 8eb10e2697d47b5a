"""The tables of ``bench``: one for each way to decode and number of new tokens."""

from __future__ import annotations

from typing import Any

from transmla.cli.console import gigabytes, say, table
from transmla.evaluate.bench import Bench, Point

# Words for the ways of ``Point``.
WAYS = {"compiled": "compiled", "graph": "plain generate() from CUDA graphs", "eager": "plain generate()"}


def show_bench(results: dict[str, Bench]) -> None:
    """Print speeds by batch and context, one table for each way and step; with a baseline, its speeds and the ratio."""
    ours, theirs = results["model"], results.get("baseline")
    before = {} if theirs is None else {point.what: point for point in theirs.points}
    for new, compiled in dict.fromkeys(point.what[2:] for point in ours.points):
        points = [point for point in ours.points if point.what[2:] == (new, compiled)]
        _show_points(ours, points, None if theirs is None else before)
    say(
        "prompt s: seconds to read the prompt of one sequence. of copy: bytes of cache and weights that a step reads in"
        f" a second, as a share of this device's copy speed, {ours.copy_bytes_per_second / 1e9:,.0f} GB/s"
    )
    for reason in sorted({point.reason for point in ours.points if point.reason}):
        say(f"steps ran eagerly, not from a CUDA graph: {reason}")


def _show_points(ours: Bench, points: list[Point], before: dict[Any, Point] | None) -> None:
    """Print ``points``, measured in one way, beside those of a baseline with the same keys ``what``."""
    rows, forms = [], [point.form for point in points]
    differ = len({*forms}) > 1
    for point in points:
        row = [f"{point.batch}", f"{point.context:,}", f"{point.tokens_per_second:,.1f}"]
        other = None if before is None else before.get(point.what)
        if other is not None:
            speeds = other.tokens_per_second, point.tokens_per_second / other.tokens_per_second
            row += [f"{speeds[0]:,.1f}", f"{speeds[1]:.2f}"]
        elif before is not None:
            row += ["–", "–"]
        row += [
            f"{point.step_seconds * 1e3:,.1f}",
            f"{point.prefill_seconds:,.2f}",
            gigabytes(point.cache_bytes),
            f"{point.bytes_per_second / ours.copy_bytes_per_second:.0%}",
        ]
        rows.append([*row, point.form or "–"] if differ else row)
    ways = " and ".join(WAYS[way] for way in sorted({point.way for point in points}))
    several = f", {points[0].new_tokens} tokens a step" if points[0].new_tokens > 1 else ""
    form = "" if differ or forms[0] is None else f", {forms[0]} form"
    compared = [] if before is None else ["base", "ratio"]
    table(
        f"decoding on {ours.device}, {ours.dtype}, backend {ours.backend}, {ways}{several}{form}",
        [
            "batch",
            "tokens",
            "tok/s",
            *compared,
            "step ms",
            "prompt s",
            "cache",
            "of copy",
            *(["form"] if differ else []),
        ],
        rows,
    )
