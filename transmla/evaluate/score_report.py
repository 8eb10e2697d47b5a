"""PNG figures of task scores and of retrieval by length and depth, and their sections of an HTML report."""

from __future__ import annotations

import base64
import html
from io import BytesIO
from typing import Any

from transmla.evaluate.figures import new_figure
from transmla.evaluate.retrieval import Retrieval
from transmla.evaluate.retrieval_prompts import PAIRS
from transmla.evaluate.score_table import RETRIEVAL_COLUMNS, TASK_COLUMNS, retrieval_rows, task_rows
from transmla.evaluate.tasks import TaskScores


def heat_map(result: Retrieval) -> bytes:
    """Draw the share of found keys as a PNG: one panel per kind and model, lengths over depths.

    A length that did not fit into memory stays white.
    """
    roles = [role for role in ("baseline", "model") if role in result.cells]
    figure = new_figure(1.8 + (0.9 + 0.7 * len(result.lengths)) * len(roles), 1.2 + 2.4 * len(PAIRS))
    panels = figure.subplots(len(PAIRS), len(roles), squeeze=False, sharex=True, sharey=True)
    for row, kind in zip(panels, PAIRS, strict=True):
        for axes, role in zip(row, roles, strict=True):
            image = _panel(axes, result, kind, role)
            axes.set_title(f"{kind}, {role}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("tokens")
    for axes in panels[:, 0]:
        axes.set_ylabel("depth of the key")
    figure.colorbar(image, ax=panels.ravel().tolist(), format="{x:.0%}", label="keys found")
    return _png(figure)


def _panel(axes: Any, result: Retrieval, kind: str, role: str) -> Any:
    """Draw the cells of one kind and model, each with its share in per cent; return the image."""
    found = {(cell.depth, cell.length): cell.correct / cell.prompts for cell in result.cells[role] if cell.kind == kind}
    shares = [[found.get((depth, length), float("nan")) for length in result.lengths] for depth in result.depths]
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(result.lengths)), [f"{length:,}" for length in result.lengths])
    axes.set_yticks(range(len(result.depths)), [f"{depth:.0%}" for depth in result.depths])
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share == share:  # not NaN
                color = "black" if share > 0.5 else "white"
                axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=8, color=color)
    return image


def task_bars(result: TaskScores) -> bytes:
    """Draw the scores of all tasks as a PNG: one bar per model and metric, with two standard errors on each side.

    Metrics whose higher values are not better, such as perplexities, are left out.
    """
    scores = [score for score in result.scores if score.higher_is_better]
    figure = new_figure(8, 1.2 + 0.6 * len(scores))
    axes = figure.subplots()
    for i, role in enumerate(["baseline", "model"] if result.baseline else ["model"]):
        values = [getattr(score, role) for score in scores]
        errors = [2 * (value.stderr or 0) for value in values]
        rows = [y + 0.35 * i for y in range(len(scores))]
        axes.barh(rows, [value.value for value in values], 0.33, xerr=errors, label=role, color=f"C{1 - i}")
    names = [f"{score.task}: {score.metric}" for score in scores]
    axes.set_yticks([y + 0.17 * bool(result.baseline) for y in range(len(scores))], names)
    axes.invert_yaxis()
    axes.set(xlabel="score; the lines are two standard errors", xlim=(0, None))
    figure.legend(loc="outside right upper")
    return _png(figure)


def tasks_html(result: TaskScores) -> tuple[str, str]:
    """Return title and HTML of the report's section on tasks: the table, and the figure embedded as base64."""
    drawn = _embed(task_bars(result), "scores by task") if any(s.higher_is_better for s in result.scores) else ""
    return f"Tasks (lm-evaluation-harness {result.harness})", _table(TASK_COLUMNS, task_rows(result)) + drawn


def retrieval_html(result: Retrieval) -> tuple[str, str]:
    """Return title and HTML of the report's section on retrieval: the table, and the heat map embedded as base64."""
    drawn = _embed(heat_map(result), "keys found by length and depth")
    return "Retrieval", _table(RETRIEVAL_COLUMNS, retrieval_rows(result)) + drawn


def _table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"


def _embed(png: bytes, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">\n'


def _png(figure: Any) -> bytes:
    data = BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()
