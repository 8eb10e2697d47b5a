"""Pictures: a survey, to choose a budget by; speeds, to see what it bought."""

from __future__ import annotations

import base64
import html
import io
import os
from pathlib import Path
from typing import Any

import torch

from transmla.bench import Bench
from transmla.errors import TransmlaError
from transmla.survey import Survey

_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>body {{ font: 15px/1.5 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }}
img {{ width: 100% }} td, th {{ padding: .15em .9em; text-align: right }} tr:nth-child(even) {{ background: #f4f4f4 }}
</style>
<h1>{title}</h1>
<p>{text}</p>
<table>{table}</table>
<img alt="spectra, rotary energy, phases and errors by layer" src="data:image/png;base64,{image}">
"""
_TEXT = (
    "Error is ‖MLA − source‖² / ‖source‖² of a layer's attention output, on calibration text and before any"
    " reconstruction."
)


def write_picture(survey: Survey, path: Path) -> None:
    """Write ``path`` as a PNG, or as one self-contained HTML page.

    Raises:
        TransmlaError: for another suffix, a folder that is not there, or without matplotlib.
    """
    check_picture(path)
    image = _draw(survey)
    if path.suffix == ".png":
        path.write_bytes(image)
        return
    rows = [
        "<tr><th>cache</th><th>kv_lora_rank</th><th>qk_rope_head_dim</th><th>mean error</th></tr>",
        *(
            f"<tr><td>{plan.cache_ratio:.1%}</td><td>{plan.shape.kv_lora_rank}</td>"
            f"<td>{plan.shape.qk_rope_head_dim}</td><td>{survey.mean_error(budget):.4f}</td></tr>"
            for budget, plan in survey.plans.items()
        ),
    ]
    page = _PAGE.format(
        title=html.escape(f"{survey.source} under MLA"),
        text=_TEXT,
        table="\n".join(rows),
        image=base64.b64encode(image).decode(),
    )
    path.write_text(page, encoding="utf-8")


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


def _draw(survey: Survey) -> bytes:
    figure = _figure(13, 9)
    (decay, errors), (energy, phase) = figure.subplots(2, 2)
    _draw_decay(decay, survey)
    _draw_errors(errors, survey)
    _draw_rotary(energy, survey)
    shown = phase.imshow(
        torch.stack([layer.spectrum.phase for layer in survey.layers]).cpu(), aspect="auto", vmin=0, vmax=1
    )
    figure.colorbar(shown, ax=phase, label="|φ|")
    phase.set(title="phase: 1 = RoPE can be a constant, 0 = it cannot", xlabel="frequency, fast → slow", ylabel="layer")
    figure.suptitle(f"{survey.source} under MLA")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_decay(axes: Any, survey: Survey) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for i, layer in enumerate(survey.layers):
        left = (1 - layer.spectrum.joint.cumsum(0)).clamp_min(1e-6).cpu()
        axes.semilogy(range(1, len(left) + 1), left, color=colours(i / len(survey.layers)), linewidth=0.8)
    for plan in survey.plans.values():
        axes.axvline(plan.shape.kv_lora_rank, color="grey", linewidth=0.8, linestyle=":")
        axes.text(plan.shape.kv_lora_rank, 1.0, f" {plan.cache_ratio:.0%}", fontsize=8, va="top")
    axes.set(
        title="keys and values without position (dark: first layer, light: last)",
        xlabel="kv_lora_rank",
        ylabel="energy left out",
        ylim=(1e-4, 1.2),
    )


def _draw_errors(axes: Any, survey: Survey) -> None:
    for budget, plan in survey.plans.items():
        label = f"{plan.cache_ratio:.1%}: {plan.shape.kv_lora_rank} + {plan.shape.qk_rope_head_dim}"
        axes.plot([layer.errors[budget] for layer in survey.layers], label=label, marker=".", linewidth=1)
    axes.set(title="error of the attention output, closed form", xlabel="layer", ylabel="relative squared error")
    axes.set_ylim(bottom=0)
    axes.legend(title="cache: latent + rotary")


def _draw_rotary(axes: Any, survey: Survey) -> None:
    spectra = [layer.spectrum for layer in survey.layers]
    energy = torch.stack([s.rotary for s in spectra])
    mean = energy.mean(0).cpu()
    shared = (energy * torch.stack([s.shared for s in spectra])).mean(0).cpu()
    one_head = (energy * torch.stack([s.one_head for s in spectra])).mean(0).cpu()
    ticks = range(len(mean))
    axes.bar(ticks, mean, color="lightgrey", label="in all key heads")
    axes.bar(ticks, shared, width=0.55, label="held by one channel mixed from all heads")
    axes.bar(ticks, one_head, width=0.25, label="held by the best single head")
    axes.set(title="rotary energy, mean over layers", xlabel="frequency, fast → slow", ylabel="share of the energy")
    axes.legend()
