"""The verb ``eval``: texts, tasks and retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from transmla.cli.early import load_libraries, refuse_dtype, refuse_models
from transmla.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    PickleOption,
    given_options,
    section_options,
    with_evaluation_options,
)
from transmla.files import json_text


@with_evaluation_options
def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Any causal LM: folder, .gguf file, Hub id or package:NAME/FILE."),
    ],
    *,
    baseline: Annotated[str | None, typer.Option(help="Also measure KL and top-1 agreement to this model.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write a report with figures into this .html file.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    allow_pickle: PickleOption = False,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Measure perplexity on texts, scores of lm-evaluation-harness, and retrieval; all beside a baseline.

    The table has one row per text, with standard errors over windows. Windows start with BOS if the tokenizer starts
    texts with it. With `--tasks` or `--retrieval`, texts are measured only if `--text` is given.

    Example: transmla eval llama-mla --baseline meta-llama/Llama-3.1-8B --text wikitext --text pydoc
    --report quality.html

    Example: transmla eval llama-mla --baseline meta-llama/Llama-3.1-8B --tasks hellaswag --tasks gsm8k --retrieval
    """
    from transmla.evaluate import figures
    from transmla.evaluate.settings import RetrievalSettings, TaskSettings
    from transmla.evaluate.texts import check_texts
    from transmla.recipe import Evaluation, parse_section

    given = given_options(options)
    by_task, by_retrieval = "tasks" in given, "retrieval" in given
    by_text = "text" in given or not (by_task or by_retrieval)
    for_texts = parse_section(Evaluation, section_options(given, Evaluation, "text", wanted=by_text))
    for_tasks = parse_section(TaskSettings, section_options(given, TaskSettings, "tasks", wanted=by_task))
    grid = section_options(given, RetrievalSettings, "retrieval", wanted=by_retrieval)
    for_retrieval = parse_section(RetrievalSettings, grid)
    for file, suffix in ((report, ".html"), (for_retrieval.retrieval_plot, ".png")):
        if file:
            figures.check_picture(file, (suffix,))
    refuse_dtype(dtype)
    refuse_models(model, baseline)
    if by_text:
        check_texts(for_texts)
    load_libraries()
    from transmla.cli import console, eval_report, score_report
    from transmla.cli.bars import Bars
    from transmla.cli.report import Section
    from transmla.evaluate import harness, retrieval, tasks
    from transmla.evaluate.compare import evaluate_models
    from transmla.source.device import pick_device

    pick_device(device)  # before a text or a task is read
    lengths = retrieval.choose_lengths(model, baseline, for_retrieval) if by_retrieval else ()
    loaded_tasks = harness.open_tasks(for_tasks) if by_task else {}

    run: dict[str, Any] = {"dtype": dtype, "device": device, "allow_pickle": allow_pickle}
    found: dict[str, Any] = {}
    sections: list[Section] = []
    shown = []
    with Bars() as bars:
        if by_text:
            found = evaluate_models(model, baseline, for_texts, **run, reporter=bars)
            shown.append(lambda: console.show_evaluation(found))
        if by_task:
            scores = tasks.evaluate_tasks(model, baseline, for_tasks, loaded_tasks, **run, reporter=bars)
            found["tasks"] = scores.to_dict()
            shown.append(lambda: console.show_tasks(scores))
            if report:
                sections.append(score_report.tasks_section(scores))
        if by_retrieval:
            keys = retrieval.evaluate_retrieval(model, baseline, for_retrieval, lengths, **run, reporter=bars)
            found["retrieval"] = keys.to_dict()
            shown.append(lambda: console.show_retrieval(keys))
            if report:
                sections.append(score_report.retrieval_section(keys))
            if for_retrieval.retrieval_plot:
                score_report.heat_map(keys).savefig(for_retrieval.retrieval_plot, format="png", dpi=110)
    if as_json:
        print(json_text(found))
    else:
        for show in shown:
            show()
    if report:
        eval_report.write_evaluation({"model": model, "baseline": baseline} | found, report, sections)
    for written in (report, for_retrieval.retrieval_plot):
        if written:
            console.err.print(f"wrote {written}", highlight=False, markup=False)
