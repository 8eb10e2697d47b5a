"""The parts of the report of ``transmla eval`` on tasks and on retrieval, with their figures."""

from __future__ import annotations

from typing import Any

from transmla.cli.report import Section, picture, table
from transmla.evaluate.figures import new_figure
from transmla.evaluate.retrieval import Retrieval
from transmla.evaluate.retrieval_prompts import PAIRS
from transmla.evaluate.score_table import RETRIEVAL_COLUMNS, TASK_COLUMNS, retrieval_rows, task_rows
from transmla.evaluate.tasks import TaskScores


def heat_map(result: Retrieval) -> Any:
    """Return the share of found keys as a matplotlib figure: one panel per kind and model, lengths over depths.

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
    return figure


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


def task_bars(result: TaskScores) -> Any:
    """Return the scores of all tasks as a matplotlib figure: a bar per model and metric, with two standard errors.

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
    return figure


def tasks_section(result: TaskScores) -> Section:
    """Return the report's section on tasks: the table, and the figure if a score is better when it is higher."""
    higher = any(score.higher_is_better for score in result.scores)
    drawn = picture(task_bars(result), "scores by task") if higher else ""
    return Section(f"Tasks (lm-evaluation-harness {result.harness})", table(TASK_COLUMNS, task_rows(result)) + drawn)


def retrieval_section(result: Retrieval) -> Section:
    """Return the report's section on retrieval: the table and the heat map."""
    drawn = picture(heat_map(result), "keys found by length and depth")
    return Section("Retrieval", table(RETRIEVAL_COLUMNS, retrieval_rows(result)) + drawn)
