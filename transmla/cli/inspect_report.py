"""Draw the report of ``transmla inspect``, as a PNG or as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from transmla.cli.console import BUDGET_COLUMNS, budget_rows
from transmla.cli.report import Section, paragraph, picture, table, write_report
from transmla.convert.inspect import Inspection
from transmla.evaluate.figures import check_picture, new_figure

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
    figure = _draw(inspection)
    if path.suffix == ".png":
        figure.savefig(path, format="png", dpi=110)
        return
    errors = table(BUDGET_COLUMNS, budget_rows(inspection)) + paragraph(_TEXT)
    layers = picture(figure, "spectra, rotary energy, phases and errors by layer")
    sections = [Section("Mean error by budget", errors), Section("Layers", layers)]
    write_report(path, f"{inspection.source} under MLA", {}, sections)


def _draw(inspection: Inspection) -> Any:
    figure = new_figure(13, 9)
    (decay, errors), (energy, phase) = figure.subplots(2, 2)
    _draw_decay(decay, inspection)
    _draw_errors(errors, inspection)
    _draw_rotary(energy, inspection)
    shown = phase.imshow(
        torch.stack([layer.spectrum.phase for layer in inspection.layers.values()]).cpu(), aspect="auto", vmin=0, vmax=1
    )
    if len(inspection.layers) < inspection.count:
        phase.set_yticks(range(len(inspection.layers)), [str(i) for i in inspection.layers])
    figure.colorbar(shown, ax=phase, label="|φ|")
    phase.set(title="phase: 1 = RoPE can be a constant, 0 = it cannot", xlabel="frequency, fast → slow", ylabel="layer")
    figure.suptitle(f"{inspection.source} under MLA")
    return figure


def _draw_decay(axes: Any, inspection: Inspection) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for i, layer in enumerate(inspection.layers.values()):
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
        measured = [layer.errors[budget] for layer in inspection.layers.values()]
        axes.plot(list(inspection.layers), measured, label=label, marker=".", linewidth=1)
    axes.set(title="error of the attention output, closed form", xlabel="layer", ylabel="relative squared error")
    axes.set_ylim(bottom=0)
    axes.legend(title="cache: latent + rotary")


def _draw_rotary(axes: Any, inspection: Inspection) -> None:
    spectra = [layer.spectrum for layer in inspection.layers.values()]
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
