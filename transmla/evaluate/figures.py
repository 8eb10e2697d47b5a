"""PNG figures: decoding speeds and healing curves; also the checks and the canvas that other figures use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transmla.errors import TransmlaError, missing_package

if TYPE_CHECKING:
    from transmla.evaluate.bench import Bench


def check_picture(path: Path, suffixes: tuple[str, ...] = (".png", ".html")) -> None:
    """Check that a figure can be written to ``path``, before anything is measured.

    Raises:
        TransmlaError: if the suffix is not one of ``suffixes``, the path cannot be written, its folder does not exist,
            or matplotlib is not installed.
    """
    if path.suffix not in suffixes:
        limit = f"a figure is a {' or '.join(suffixes)} file"
        raise TransmlaError(f"cannot draw '{path}'", limit=limit, remedy="choose another name")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise TransmlaError(
            f"cannot write '{path}'", limit="it is a folder, or write-protected", remedy="choose another name"
        )
    if not path.absolute().parent.is_dir():
        raise TransmlaError(
            f"no folder '{path.absolute().parent}'",
            limit="a figure is written into an existing folder",
            remedy="create the folder, or choose another one",
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing_package("drawing needs matplotlib", "matplotlib") from error


def write_speeds(found: dict[str, Bench], path: Path) -> None:
    """Draw tokens per second over context length as a PNG: one line per batch size, dashed for the baseline.

    Args:
        found: the result of ``bench_models``.
        path: the file to write.
    """
    from matplotlib.ticker import LogLocator

    figure = new_figure(8, 5)
    axes = figure.subplots()
    for role, style in (("model", "-"), ("baseline", "--")):
        every = found[role].points if role in found else []
        # The fastest way of the smallest step, as a user would run it.
        points = [p for p in every if p.new_tokens == min(q.new_tokens for q in every)]
        points = [*{p.what[:2]: p for p in sorted(points, key=lambda p: p.tokens_per_second)}.values()]
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
    """Draw a healing's loss and held-out KL over the training tokens as a PNG.

    Args:
        curve: one point per evaluation, as the manifest records them.
        path: the file to write.
    """
    figure = new_figure(8, 5)
    axes = figure.subplots()
    tokens = [point["tokens"] for point in curve]
    axes.plot(tokens, [point["held_out_kl"] for point in curve], marker=".", label="held-out: KL(teacher ‖ student)")
    axes.plot(tokens[1:], [point["loss"] for point in curve[1:]], ":", label="training: loss")
    axes.set(title="healing", xlabel="tokens", ylabel="nats per token", ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    figure.savefig(path, format="png", dpi=110)


def new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # pyplot would keep global state and may need a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
