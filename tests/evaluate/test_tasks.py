"""Tasks of lm-evaluation-harness: real tasks in YAML on tiny models, and mistakes before a model is loaded."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import uncut_exports
from helpers.tiny_sources import build_model, build_tokenizer
from typer.testing import CliRunner

from transmla.cli.app import build
from transmla.cli.score_report import tasks_section
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.evaluate import harness
from transmla.evaluate.harness import open_tasks
from transmla.evaluate.settings import TaskSettings
from transmla.evaluate.tasks import Score, TaskScore, TaskScores, evaluate_tasks
from transmla.recipe import Recipe
from transmla.reporter import Silent

pytest.importorskip("lm_eval")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1.0}}
"""
COPY = """
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICE = """
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXT = """
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a generated task ``copy``, a choice ``choice`` and a text ``text``, six documents each."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    words = ["the cat sat", "the dog sat on", "the log and", "a mat on the log", "dog and cat", "on the mat"]
    rows = [{"question": w, "choices": [" cat", " dog", " log"], "answer": i % 3} for i, w in enumerate(words)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, rest in (
        ("copy", "generate_until", COPY),
        ("choice", "multiple_choice", CHOICE),
        ("text", "loglikelihood_rolling", TEXT),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, data=data) + rest)
    return folder


def score(model: Path, baseline: Path | None, folder: Path, *tasks: str, **changes: Any) -> TaskScores:
    settings = TaskSettings(tasks=tasks, tasks_path=str(folder), **changes)
    return evaluate_tasks(
        str(model),
        None if baseline is None else str(baseline),
        settings,
        open_tasks(settings),
        device="cpu",
        reporter=Silent(),
    )


def test_an_uncut_export_scores_like_its_source(folder: Path, tmp_path: Path) -> None:
    source = uncut_exports.make_source("qwen3", tmp_path / "source", vocab_size=128, bos_token_id=0, eos_token_id=1)
    export = uncut_exports.uncut(source, tmp_path / "source", tmp_path / "export")
    for place in ("source", "export"):
        build_tokenizer(tmp_path / place)
    found = score(export, tmp_path / "source", folder, "copy", "choice", "text")
    assert [(s.task, s.metric) for s in found.scores] == [
        ("copy", "exact_match"),
        ("choice", "acc"),
        ("text", "word_perplexity"),
    ]
    assert found.documents == {"copy": 6, "choice": 6, "text": 6}
    for entry in found.scores:
        assert entry.baseline is not None
        assert entry.model.value == pytest.approx(entry.baseline.value, rel=1e-4)
    assert found.scores[1].model.stderr is not None
    assert [entry.higher_is_better for entry in found.scores] == [True, True, False]
    assert found.scores[2].model.value > 1


def test_likelihoods_and_texts_of_an_export_are_its_sources(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of random models may agree by chance; the harness's answers may not."""
    source = uncut_exports.make_source("llama", tmp_path / "source", vocab_size=128, bos_token_id=0, eos_token_id=1)
    export = uncut_exports.uncut(source, tmp_path / "source", tmp_path / "export")
    answers: list[Any] = []
    monkeypatch.setattr(harness._Counter, "add_partial", lambda self, kind, request, answer: answers.append(answer))
    for place in ("source", "export"):
        build_tokenizer(tmp_path / place)
    score(export, tmp_path / "source", folder, "copy", "choice")
    half = len(answers) // 2
    assert half == 6 + 6 * 3
    for theirs, ours in zip(answers[:half], answers[half:], strict=True):
        if isinstance(theirs, str):
            assert ours == theirs
        else:
            assert ours[0] == pytest.approx(theirs[0], abs=1e-3)
    assert any(isinstance(answer, str) and answer for answer in answers)


def test_a_native_export_is_scored(folder: Path, make_source: Callable[..., Path], make_recipe: Any) -> None:
    source = make_source(num_hidden_layers=3)
    recipe: Recipe = make_recipe(source, cache_ratio=0.5)
    found = score(convert(recipe), source, folder, "copy", "choice", limit=4, num_fewshot=0)
    assert found.documents == {"copy": 4, "choice": 4}
    assert all(0 <= entry.model.value <= 1 for entry in found.scores)


def test_texts_begin_with_bos_where_the_tokenizer_adds_it(folder: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    build_tokenizer(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    starting = AutoTokenizer.from_pretrained(tmp_path)
    starting.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model = build_model(num_hidden_layers=1)
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    settings = TaskSettings(tasks=("choice",), tasks_path=str(folder), limit=2)
    for tokenizer, begins in ((plain, False), (starting, True)):
        seen.clear()
        harness.run_tasks(model, tokenizer, open_tasks(settings), settings, name="model", reporter=Silent())
        assert seen
        assert all(bool((tokens[:, 0] == 0).all()) == begins for tokens in seen)


def test_the_share_kept_is_of_scores_that_should_be_high() -> None:
    pair = Score(0.4, 0.1), Score(0.5, 0.1)
    assert TaskScore("a", "acc", True, *pair).kept == pytest.approx(0.8)
    assert TaskScore("a", "word_perplexity", False, *pair).kept is None
    assert TaskScore("a", "acc", True, Score(0.4, None), Score(0.0, None)).kept is None
    assert TaskScore("a", "acc", True, Score(0.4, None), None).kept is None


def test_the_report_has_the_table_and_a_figure() -> None:
    entry = TaskScore("a<b", "acc", True, Score(0.4, 0.1), Score(0.5, None))
    section = tasks_section(TaskScores("m", "b", "0.4", {"a<b": 6}, {"a<b": 0}, (entry,), 1.0))
    assert section.title.startswith("Tasks")
    assert "<td>a&lt;b</td><td>acc</td><td>6</td><td>0.400 ± 0.100</td><td>0.500</td><td>80.0%</td>" in section.html
    assert 'src="data:image/png;base64,iVBOR' in section.html


def refused(*argv: str) -> str:
    # An empty folder holds no model: the refusal comes before a model is opened.
    with tempfile.TemporaryDirectory() as folder:
        result = CliRunner().invoke(build(), ["eval", folder, *argv])
    assert isinstance(result.exception, TransmlaError)
    return str(result.exception)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert 'pip install "lm-eval>=0.4.13"' in refused("--tasks", "hellaswag")


def test_an_unknown_task_gives_the_nearest_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import tasks

    real = tasks.TaskManager
    # The index of the harness's own tasks takes half a minute.
    monkeypatch.setattr(tasks, "TaskManager", lambda **kwargs: real(**{**kwargs, "include_defaults": False}))
    says = refused("--tasks", "choise", "--tasks-path", str(folder))
    assert "has no task 'choise'; the nearest names: choice" in says
    assert "no folder" in refused("--tasks", "choice", "--tasks-path", str(folder / "nowhere"))


def test_data_that_cannot_be_loaded_is_one_line(folder: Path) -> None:
    (folder / "data.jsonl").unlink()
    says = refused("--tasks", "choice", "--tasks-path", str(folder))
    assert "the data of task 'choice' cannot be loaded; FileNotFoundError" in says


def test_flags_of_tasks_need_tasks(folder: Path) -> None:
    assert "--limit has no effect here; add --tasks" in refused("--limit", "3")
    assert "--window has no effect here; add --text" in refused("--window", "64", "--tasks", "choice")


def test_the_command_line_prints_a_table_and_json(folder: Path, make_source: Callable[..., Path]) -> None:
    source = str(make_source())
    argv = ["eval", source, "--baseline", source, "--tasks", "choice", "--tasks-path", str(folder), "--device", "cpu"]
    result = CliRunner().invoke(build(), argv)
    assert result.exit_code == 0
    assert "choice" in result.stdout
    assert "perplexity" not in result.stdout
    found = json.loads(CliRunner().invoke(build(), [*argv, "--json"]).stdout)
    assert set(found) == {"tasks"}
    assert found["tasks"]["scores"][0]["model"] == found["tasks"]["scores"][0]["baseline"]
