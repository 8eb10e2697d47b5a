"""Scores of a model on tasks of lm-evaluation-harness, beside a baseline's.

The harness reads the tasks, builds the prompts and computes the metrics. This file loads the models and collects the
scores.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from transmla.evaluate.harness import LoadedTasks, run_tasks
from transmla.evaluate.open_model import for_each_model
from transmla.evaluate.settings import TaskSettings
from transmla.reporter import Reporter
from transmla.source.device import pick_device


@dataclass(frozen=True)
class Score:
    """One value of a metric, and its standard error if the harness gives one."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: name of the task or group.
        metric: name of the metric, with the harness's filter in brackets unless it is "none".
        higher_is_better: whether a higher value is better; None if the harness does not know.
        model: score of the model.
        baseline: score of the baseline, or None.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    model: Score
    baseline: Score | None

    @property
    def kept(self) -> float | None:
        """The model's score divided by the baseline's; None where that is no share."""
        if self.baseline is None or self.baseline.value <= 0 or not self.higher_is_better:
            return None
        return self.model.value / self.baseline.value


@dataclass(frozen=True)
class TaskScores:
    """Result of ``evaluate_tasks``.

    Attributes:
        model: name of the model.
        baseline: name of the baseline, or None.
        harness: version of lm-evaluation-harness.
        documents: documents per task that were scored.
        shots: examples in each prompt, per task.
        scores: one entry per task and metric.
        seconds: time of the evaluation, loading included.
    """

    model: str
    baseline: str | None
    harness: str
    documents: dict[str, int]
    shots: dict[str, int]
    scores: tuple[TaskScore, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"scores": [asdict(score) | {"kept": score.kept} for score in self.scores]}


def evaluate_tasks(
    model: str,
    baseline: str | None,
    settings: TaskSettings,
    tasks: LoadedTasks,
    *,
    dtype: str = "auto",
    device: str = "auto",
    allow_pickle: bool = False,
    reporter: Reporter,
) -> TaskScores:
    """Score a model and a baseline on tasks. Only one of them is in memory at a time.

    Args:
        model: folder, GGUF file or Hub name.
        baseline: the same for the baseline, or None.
        settings: documents, examples and batches.
        tasks: the result of ``open_tasks``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: device name, or ``auto``.
        allow_pickle: whether pickled weights may be opened.
        reporter: receives the progress.

    Raises:
        TransmlaError: if a model cannot be loaded, or the harness fails.
    """
    started, torch_device = time.perf_counter(), pick_device(device)

    def run(loaded: Any, tokenizer: Any, role: str) -> dict[str, Any]:
        return run_tasks(loaded, tokenizer, tasks, settings, name=role, reporter=reporter)

    found = for_each_model(model, baseline, dtype=dtype, device=torch_device, run=run, allow_pickle=allow_pickle)
    results, reference = found["model"], found.get("baseline")
    return TaskScores(
        model=model,
        baseline=baseline,
        harness=version("lm_eval"),
        documents={name: count["effective"] for name, count in results["n-samples"].items()},
        shots=dict(results["n-shot"]),
        scores=tuple(_scores(results, reference)),
        seconds=time.perf_counter() - started,
    )


def _scores(results: dict[str, Any], reference: dict[str, Any] | None) -> Iterator[TaskScore]:
    """Yield the metrics of all tasks, in the harness's order. Its keys are "metric,filter"."""
    for task, metrics in results["results"].items():
        better = results["higher_is_better"].get(task, {})
        for key in metrics:
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            yield TaskScore(
                task=task,
                metric=metric if chosen == "none" else f"{metric} ({chosen})",
                higher_is_better=better.get(metric),
                model=_score(metrics, metric, chosen),
                baseline=None if reference is None else _score(reference["results"][task], metric, chosen),
            )


def _score(metrics: dict[str, Any], metric: str, chosen: str) -> Score:
    stderr = metrics.get(f"{metric}_stderr,{chosen}")
    # Without a standard error, the harness writes "N/A".
    return Score(float(metrics[f"{metric},{chosen}"]), float(stderr) if isinstance(stderr, int | float) else None)
