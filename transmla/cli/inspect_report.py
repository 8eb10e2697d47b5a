"""Draw the report of ``transmla inspect``, as a PNG or as one HTML page."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import torch

from transmla.convert.inspect import Inspection
from transmla.evaluate.figures import check_picture, new_figure

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


def write_picture(inspection: Inspection, path: Path) -> None:
    """Write ``path`` as a PNG, or as one self-contained HTML page.

    Raises:
        TransmlaError: for another suffix, a folder that is not there, or without matplotlib.
    """
    check_picture(path)
    image = _draw(inspection)
    if path.suffix == ".png":
        path.write_bytes(image)
        return
    rows = [
        "<tr><th>cache</th><th>kv_lora_rank</th><th>qk_rope_head_dim</th><th>mean error</th></tr>",
        *(
            f"<tr><td>{plan.cache_ratio:.1%}</td><td>{plan.shape.kv_lora_rank}</td>"
            f"<td>{plan.shape.qk_rope_head_dim}</td><td>{inspection.mean_error(budget):.4f}</td></tr>"
            for budget, plan in inspection.plans.items()
        ),
    ]
    page = _PAGE.format(
        title=html.escape(f"{inspection.source} under MLA"),
        text=_TEXT,
        table="\n".join(rows),
        image=base64.b64encode(image).decode(),
    )
    path.write_text(page, encoding="utf-8")


def _draw(inspection: Inspection) -> bytes:
    figure = new_figure(13, 9)
    (decay, errors), (energy, phase) = figure.subplots(2, 2)
    _draw_decay(decay, inspection)
    _draw_errors(errors, inspection)
    _draw_rotary(energy, inspection)
    shown = phase.imshow(
        torch.stack([layer.spectrum.phase for layer in inspection.layers]).cpu(), aspect="auto", vmin=0, vmax=1
    )
    figure.colorbar(shown, ax=phase, label="|φ|")
    phase.set(title="phase: 1 = RoPE can be a constant, 0 = it cannot", xlabel="frequency, fast → slow", ylabel="layer")
    figure.suptitle(f"{inspection.source} under MLA")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_decay(axes: Any, inspection: Inspection) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for i, layer in enumerate(inspection.layers):
        left = (1 - layer.spectrum.joint.cumsum(0)).clamp_min(1e-6).cpu()
        axes.semilogy(range(1, len(left) + 1), left, color=colours(i / len(inspection.layers)), linewidth=0.8)
    for plan in inspection.plans.values():
        axes.axvline(plan.shape.kv_lora_rank, color="grey", linewidth=0.8, linestyle=":")
        axes.text(plan.shape.kv_lora_rank, 1.0, f" {plan.cache_ratio:.0%}", fontsize=8, va="top")
    axes.set(
        title="keys and values without position (dark: first layer, light: last)",
        xlabel="kv_lora_rank",
        ylabel="energy left out",
        ylim=(1e-4, 1.2),
    )


def _draw_errors(axes: Any, inspection: Inspection) -> None:
    for budget, plan in inspection.plans.items():
        label = f"{plan.cache_ratio:.1%}: {plan.shape.kv_lora_rank} + {plan.shape.qk_rope_head_dim}"
        axes.plot([layer.errors[budget] for layer in inspection.layers], label=label, marker=".", linewidth=1)
    axes.set(title="error of the attention output, closed form", xlabel="layer", ylabel="relative squared error")
    axes.set_ylim(bottom=0)
    axes.legend(title="cache: latent + rotary")


def _draw_rotary(axes: Any, inspection: Inspection) -> None:
    spectra = [layer.spectrum for layer in inspection.layers]
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
