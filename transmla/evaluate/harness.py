"""lm-evaluation-harness: open its tasks, and run them on a loaded model.

Only this file imports the harness, which is the optional extra ``eval``.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import torch

from transmla.errors import TransmlaError, missing_package
from transmla.evaluate.settings import TaskSettings
from transmla.reporter import Reporter
from transmla.source.text import text_start

# The harness's "tasks", "groups" and "group_map", each by name.
LoadedTasks = dict[str, dict[str, Any]]
# Request types of the harness; each is a method of its models.
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
# Loggers whose warnings would stand beside the progress bars and the one line of a refusal.
LOGGERS = ("lm_eval", "huggingface_hub", "datasets")
# Attributes of tasks that are refused, with the reason.
REFUSED = {"UNSAFE_CODE": "it runs code that the model writes", "MULTIMODAL": "it has pictures or sound"}
# Seed of the choice of examples, the harness's own, and of tasks that sample.
SEED = 1234
# Resamples for the standard error of a metric that is no mean. The harness's default of 100,000 takes minutes.
BOOTSTRAP = 1000


def open_tasks(settings: TaskSettings) -> LoadedTasks:
    """Return the harness's tasks and groups by name, with their data, before any model is loaded.

    The index of the harness's own tasks takes half a minute, so it is read only if ``settings.tasks_path`` does not
    have all tasks.

    Raises:
        TransmlaError: if the harness is not installed, a task is unknown, its data cannot be loaded, it runs code that
            the model writes, or it needs pictures.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        what = "--tasks needs lm-evaluation-harness"
        raise missing_package(what, "lm_eval", limit=f"it cannot be imported: {error}") from error
    folder = settings.tasks_path
    if folder is not None and not Path(folder).is_dir():
        raise TransmlaError(f"no folder '{folder}'", remedy="give --tasks-path a folder of task files in YAML")
    with quiet_harness():
        manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
        # A local group may have members among the harness's tasks.
        if manager is None or not set(settings.tasks) <= set(manager.all_subtasks):
            manager = TaskManager(include_path=folder)
        for name in settings.tasks:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                raise TransmlaError(
                    f"lm-evaluation-harness has no task '{name}'",
                    limit=f"the nearest names: {', '.join(near)}" if near else "no name is near",
                    remedy="correct the name, or give the folder of your task files by --tasks-path",
                )
        found: LoadedTasks = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in settings.tasks:
            loaded = _load_task(manager, name)
            for part in found:
                found[part] |= loaded.get(part, {})
    for name, task in found["tasks"].items():
        for attribute, reason in REFUSED.items():
            if getattr(task, attribute, False):
                raise TransmlaError(f"task '{name}' is not supported", limit=reason, remedy="choose another task")
        _set_examples(task, settings.num_fewshot)
    return found


def _set_examples(task: Any, number: int | None) -> None:
    """Set the number of examples in the prompts. As in the harness, a task that sets 0 itself stays without."""
    default = task.get_config("num_fewshot")
    if default is None or (number is not None and default != 0):
        task.set_config(key="num_fewshot", value=number or 0)
    task.set_fewshot_seed(seed=SEED)


def _load_task(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    # Data sets, their loaders and the tasks' own functions share no narrower class of errors.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise TransmlaError(
            f"the data of task '{name}' cannot be loaded",
            limit=f"{type(error).__name__}: {reason}" if reason else type(error).__name__,
            remedy="connect to the network, or give a task with local data by --tasks-path",
        ) from error


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: LoadedTasks,
    settings: TaskSettings,
    *,
    name: str,
    reporter: Reporter,
) -> dict[str, Any]:
    """Run the harness on a loaded model and return the harness's own results.

    Texts begin with BOS where the tokenizer adds it.

    Args:
        model: a causal LM of transformers.
        tokenizer: its tokenizer.
        tasks: the result of ``open_tasks``.
        settings: documents and batches.
        name: role of the model on the progress bars.
        reporter: receives the progress.

    Raises:
        TransmlaError: if the harness fails.
    """
    with quiet_harness():
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=settings.batch_size,
            add_bos_token=True if text_start(tokenizer) else None,
        )
        _report_progress(lm, name, reporter)
        torch.manual_seed(SEED)
        try:
            # Not `simple_evaluate`, which lists the installed packages in a second process.
            results: dict[str, Any] = evaluate(
                lm, tasks, limit=settings.limit, bootstrap_iters=BOOTSTRAP, log_samples=False
            )
        # The harness states its limits, such as a prompt longer than the context, by errors of these classes.
        except (AssertionError, ValueError) as error:
            raise TransmlaError(
                f"lm-evaluation-harness cannot score the {name}",
                limit=str(error) or type(error).__name__,
                remedy="choose other tasks, or fewer examples by --num-fewshot",
            ) from error
    return results


def _report_progress(lm: Any, name: str, reporter: Reporter) -> None:
    """Make a harness model report its answered requests, instead of drawing bars."""
    hook = _Counter(reporter)
    lm.set_cache_hook(hook)
    for kind in REQUESTS:
        setattr(lm, kind, partial(hook.answer, getattr(lm, kind), f"{name}: {kind}"))


@dataclass
class _Counter:
    """A cache hook of the harness, which calls it after every answered request."""

    reporter: Reporter
    done: int = 0

    def answer(self, method: Any, title: str, requests: list[Any]) -> Any:
        """Return the answers of a harness model's ``method``, under a new bar."""
        self.done = 0
        self.reporter.stage(title, len(requests))
        return method(requests, disable_tqdm=True)

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Count one answer."""
        self.done += 1
        self.reporter.advance(self.done)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence warnings and progress bars of the harness, and send its prints to standard error, inside the block."""
    from tqdm.std import tqdm

    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels, draw = [logger.level for logger in loggers], tqdm.__init__
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    tqdm.__init__ = partialmethod(draw, disable=True)  # type: ignore[method-assign,assignment]
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        tqdm.__init__ = draw  # type: ignore[method-assign]
