"""Rows of the tables of task scores and retrieval, as text for a terminal or a report."""

from __future__ import annotations

from transmla.evaluate.retrieval import Rate, Retrieval
from transmla.evaluate.tasks import Score, TaskScores

TASK_COLUMNS = ["task", "metric", "documents", "model", "baseline", "kept"]
RETRIEVAL_COLUMNS = ["kind", "tokens", "prompts", "model", "baseline", "kept"]


def task_rows(result: TaskScores) -> list[list[str]]:
    """Return one row per task and metric, in the order of ``TASK_COLUMNS``; "–" where a value is missing."""
    return [
        [
            score.task,
            score.metric,
            f"{result.documents[score.task]:,}" if score.task in result.documents else "–",
            _value(score.model),
            _value(score.baseline),
            _share(score.kept),
        ]
        for score in result.scores
    ]


def retrieval_rows(result: Retrieval) -> list[list[str]]:
    """Return one row per kind and length, in the order of ``RETRIEVAL_COLUMNS``; "–" where a value is missing."""
    return [
        [
            row.kind,
            f"{row.length:,}",
            f"{len(result.depths) * result.samples}",
            _value(row.model),
            _value(row.baseline),
            _share(row.kept),
        ]
        for row in result.rows()
    ]


def _value(score: Score | Rate | None) -> str:
    """Format a score and its standard error."""
    if score is None:
        return "–"
    return f"{score.value:.3f}" + ("" if score.stderr is None else f" ± {score.stderr:.3f}")


def _share(kept: float | None) -> str:
    return "–" if kept is None else f"{kept:.1%}"
