"""Pictures: a survey, to choose a budget by; speeds, to see what it bought."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transmla.errors import TransmlaError
from transmla.evaluate.bench import Bench


def check_picture(path: Path, suffixes: tuple[str, ...] = (".png", ".html")) -> None:
    """Refuse a path that cannot become a picture, before anything is measured."""
    if path.suffix not in suffixes:
        limit = f"a picture is a {' or '.join(suffixes)} file"
        raise TransmlaError(f"cannot draw '{path}'", limit=limit, remedy="rename it")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise TransmlaError(f"cannot write '{path}'", limit="it is a folder, or write-protected", remedy="rename it")
    if not path.absolute().parent.is_dir():
        raise TransmlaError(
            f"no folder '{path.absolute().parent}'",
            limit="a report goes into a folder that is there",
            remedy="create it, or choose another --report",
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise TransmlaError(
            "drawing needs matplotlib", limit="it is not installed", remedy="pip install 'transmla[plots]'"
        ) from error


def write_speeds(found: dict[str, Bench], path: Path) -> None:
    """Write ``path`` as a PNG: tokens per second by context, one line a batch, the baseline dashed."""
    from matplotlib.ticker import LogLocator

    figure = _figure(8, 5)
    axes = figure.subplots()
    for role, style in (("model", "-"), ("baseline", "--")):
        points = found[role].points if role in found else []
        for i, batch in enumerate(sorted({point.batch for point in points})):
            line = sorted((p.context, p.tokens_per_second) for p in points if p.batch == batch)
            axes.plot(*zip(*line, strict=True), style, color=f"C{i}", marker=".", label=f"{role}, batch {batch}")
    axes.set(title="decoding", xlabel="tokens in the cache", ylabel="tokens per second", yscale="log")
    contexts = sorted({point.context for result in found.values() for point in result.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:,g}")
    figure.legend(loc="outside right upper")
    figure.savefig(path, format="png", dpi=110)


def write_curve(curve: list[dict[str, Any]], path: Path) -> None:
    """Write ``path`` as a PNG: the course of a healing, on what it learned from and on what was kept aside."""
    figure = _figure(8, 5)
    axes = figure.subplots()
    tokens = [point["tokens"] for point in curve]
    axes.plot(tokens, [point["held_out_kl"] for point in curve], marker=".", label="kept aside: KL(teacher ‖ student)")
    axes.plot(tokens[1:], [point["loss"] for point in curve[1:]], ":", label="learned from: loss")
    axes.set(title="healing", xlabel="tokens", ylabel="nats per token", ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    figure.savefig(path, format="png", dpi=110)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Made without pyplot: no global state, no display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
