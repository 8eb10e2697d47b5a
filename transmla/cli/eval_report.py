"""The report of ``transmla eval``: its table, and KL by text and by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transmla.cli.report import Section, paragraph, picture, table, write_report
from transmla.evaluate.figures import new_figure
from transmla.export.evaluation_table import caption, table_columns, table_rows, text_label
from transmla.export.manifest import versions

_POSITIONS = (
    "The position of a prediction is the number of tokens before it in its window. A point is the mean over the "
    "positions from its label to the next one. Error bars show ± one standard error over windows."
)


def write_evaluation(result: Mapping[str, Any], path: Path, more: Sequence[Section] = ()) -> None:
    """Write the report of an evaluation.

    Args:
        result: the result of ``evaluate.compare.evaluate_models``; without texts, the names of model and baseline.
        path: the .html file.
        more: further sections, which follow those of the evaluation.
    """
    facts = {
        "model": result["model"],
        "baseline": result["baseline"] or "none",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    if "texts" in result:
        facts |= {
            "device": f"{result['device']}, {result['dtype']}",
            "time of the texts": f"{result['seconds']:,.0f} s",
        }
    sections = evaluation_sections(result) if "texts" in result else []
    write_report(path, f"Evaluation of {Path(result['model']).name}", facts, [*sections, *more])


def evaluation_sections(result: Mapping[str, Any]) -> list[Section]:
    """Return the sections on an evaluation: the table and, with a baseline, KL by text and by position."""
    rows = table_rows(result)
    cells = table(table_columns(result), rows, total=len(rows) > len(result["texts"]))
    sections = [Section("Texts", cells + paragraph(caption(result)))]
    if result["baseline"] is None:
        return sections
    by_text = picture(draw_texts(result), "bars: KL by text")
    by_position = picture(draw_positions(result), "lines: KL and nll difference by position")
    return [
        *sections,
        Section("KL by text", by_text),
        Section("KL by position", by_position + paragraph(_POSITIONS)),
    ]


def draw_texts(result: Mapping[str, Any]) -> Any:
    """Return a bar chart of the KL from the baseline by text, with standard errors, as a matplotlib figure."""
    texts = result["texts"]
    figure = new_figure(9.5, 1.3 + 0.45 * len(texts))
    axes = figure.subplots()
    labels = [text_label(text) for text in texts]
    errors = [text["kl_stderr"] or 0 for text in texts]
    colours = [f"C{i}" for i in range(len(texts))]
    # Positions instead of names: two texts may have the same label.
    axes.barh(range(len(texts)), [text["kl"] for text in texts], xerr=errors, color=colours, height=0.6, capsize=3)
    axes.set_yticks(range(len(texts)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="KL(baseline ‖ model), nats per token", xlim=(0, None))
    if len(texts) > 1:
        axes.axvline(result["mean"]["kl"], color="grey", linestyle="--", linewidth=1, label="mean")
        figure.legend(loc="outside right upper", frameon=False)
    _tidy(axes)
    return figure


def draw_positions(result: Mapping[str, Any]) -> Any:
    """Return KL and nll difference by position in the window, one line per text, as a matplotlib figure."""
    figure = new_figure(9.5, 4)
    panels = figure.subplots(1, 2)
    firsts = sorted({part["first"] for text in result["texts"] for part in text["positions"]})
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(firsts, [f"{first:,}" for first in firsts], rotation=45)
        axes.minorticks_off()
        axes.set(xlabel="position in the window, from", ylabel="nats per token")
        _tidy(axes)
    for text in result["texts"]:
        places = [part["first"] for part in text["positions"]]
        kl = [part["kl"] for part in text["positions"]]
        errors = [part["kl_stderr"] or 0 for part in text["positions"]]
        panels[0].errorbar(places, kl, errors, marker=".", linewidth=1.2, capsize=2, label=text_label(text))
        panels[1].plot(places, [part["nll_difference"] for part in text["positions"]], marker=".", linewidth=1.2)
    panels[0].set(title="KL(baseline ‖ model)")
    panels[0].set_ylim(bottom=0)
    panels[1].axhline(0, color="grey", linewidth=0.8)
    panels[1].set(title="nll of the model less the baseline's")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _tidy(axes: Any) -> None:
    """Remove the frame that holds no ticks."""
    axes.spines[["top", "right"]].set_visible(False)
