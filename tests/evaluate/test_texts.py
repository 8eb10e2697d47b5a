"""Evaluation on several texts: they are read before a model is loaded, and give what they give one by one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.byte_tokenizer import byte_tokenizer
from helpers.tiny_sources import build_model, build_tokenizer
from tokenizers import Tokenizer, processors

from transmla.cli.eval_report import write_evaluation
from transmla.cli.report import Section
from transmla.errors import TransmlaError
from transmla.evaluate import compare
from transmla.evaluate.compare import check_evaluation, evaluate_export, evaluate_models
from transmla.evaluate.texts import read_texts
from transmla.evaluate.verify import verify
from transmla.export.evaluation_table import caption, table_columns, table_rows
from transmla.export.push import list_files
from transmla.recipe import Evaluation, Recipe
from transmla.reporter import Silent
from transmla.source.load import load_tokenizer

BOS = 0
WORDS = "the cat sat on the mat and the dog sat on the log "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of three layers, ``bos`` with a BOS tokenizer and ``foreign`` with other tokens, and texts."""
    place = tmp_path_factory.mktemp("texts")
    vocabularies = {"model": 128, "bos": 128, "baseline": 128, "foreign": 128, "wide": 160, "narrow": 32}
    for name, vocabulary in vocabularies.items():
        model = build_model(num_hidden_layers=3, vocab_size=vocabulary)
        if name == "baseline":
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(1)
                for weight in model.parameters():
                    weight.add_(0.1 * weight.std() * torch.randn_like(weight))
        model.save_pretrained(place / name)
        build_tokenizer(place / name)
    file = place / "bos" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(file))
    byte_tokenizer(["a big red sun ran far"]).save_pretrained(place / "foreign")
    (place / "words.txt").write_text(WORDS * 12)
    (place / "other.md").write_text("# Sun\n\nA big red sun ran far. " * 20)
    (place / "rows.jsonl").write_text("".join(json.dumps({"text": "x", "body": WORDS * 8}) + "\n" for _ in range(3)))
    (place / "short.txt").write_text("a")
    (place / "empty.txt").write_text(" \n")
    return place


@pytest.fixture
def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def measured(model: str = "model", baseline: str | None = "baseline", **settings: Any) -> dict[str, Any]:
    return evaluate_models(model, baseline, Evaluation(**settings), device="cpu", reporter=Silent())


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.parametrize("model", ["model", "bos"])
@pytest.mark.parametrize(("window", "stride"), [(48, None), (33, 20)])
def test_several_texts_give_what_they_give_one_by_one(
    place: Path, model: str, window: int, stride: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    load_model = compare.load_model
    monkeypatch.setattr(compare, "load_model", lambda path, **kwargs: loaded.append(path) or load_model(path, **kwargs))
    cut = {"window": window, "stride": stride, "max_windows": 3}
    texts = ("words.txt", "pydoc", "other.md")
    together = measured(model, text=texts, **cut)
    assert loaded == [Path("baseline"), Path(model)]
    assert [text["text"] for text in together["texts"]] == list(texts)
    assert [text["split"] for text in together["texts"]] == [None, "test", None]
    assert together["starts_with_bos"] == (model == "bos")
    for name, text in zip(texts, together["texts"], strict=True):
        alone = measured(model, text=name, **cut)
        assert without_seconds(alone["texts"][0]) == without_seconds(text)
        assert alone["mean"]["kl"] == text["kl"]
        assert text["windows"] == 3
    for name in ("kl", "nll", "top1_agreement"):
        mean = sum(text[name] for text in together["texts"]) / 3
        assert together["mean"][name] == pytest.approx(mean)
    assert json.loads(json.dumps(together)) == together


def test_progress_counts_the_windows_of_all_texts(place: Path) -> None:
    stages: list[tuple[str, int]] = []
    steps: list[tuple[int, str]] = []

    class Recorder(Silent):
        def stage(self, name: str, total: int) -> None:
            stages.append((name, total))

        def advance(self, done: int, note: str = "") -> None:
            steps.append((done, note))

    settings = Evaluation(text=("words.txt", "pydoc"), window=32, max_windows=2)
    evaluate_models("model", None, settings, device="cpu", reporter=Recorder())
    assert stages == [("evaluating", 4)]
    assert steps == [(1, "words.txt"), (2, "words.txt"), (3, "pydoc"), (4, "pydoc")]


@pytest.mark.parametrize(("model", "bos"), [("model", None), ("bos", BOS)])
def test_windows_start_with_bos_where_the_tokenizer_does(place: Path, model: str, bos: int | None) -> None:
    tokenizer = load_tokenizer(Path(model))
    (text,) = read_texts(Evaluation(text="words.txt", window=16, max_windows=4), tokenizer)
    windows = text.windows.tokens(0, 4)
    plain = tokenizer(WORDS * 12, add_special_tokens=False)["input_ids"]
    width = 16 if bos is None else 15
    rows = [([] if bos is None else [bos]) + plain[i * width : (i + 1) * width] for i in range(4)]
    assert (text.windows.bos, windows.tolist()) == (bos, rows)


def test_options_apply_to_the_texts_that_take_them(place: Path) -> None:
    tokenizer = load_tokenizer(Path("model"))
    settings = Evaluation(
        text=("words.txt", "pydoc", "rows.jsonl"), split="train", column="body", window=32, max_windows=2
    )
    texts = read_texts(settings, tokenizer)
    assert [text.split for text in texts] == [None, "train", None]
    rows = tokenizer("\n\n".join([WORDS * 8] * 3), add_special_tokens=False)["input_ids"]
    assert texts[2].windows.tokens(0, 2).flatten().tolist() == rows[:64]
    assert read_texts(Evaluation(text="pydoc"), tokenizer)[0].split == "test"


REFUSALS = {
    "self": ({"text": ("words.txt", "self")}, "the text 'self' is no text to evaluate on; .* not written; give a file"),
    "auto": ({"text": "auto"}, "the text 'auto' is no text to evaluate on"),
    "missing": ({"text": ("words.txt", "nowhere.txt")}, "no file nowhere.txt"),
    "empty": ({"text": ("words.txt", "empty.txt")}, "empty.txt holds no text"),
    "short": ({"text": ("words.txt", "short.txt")}, "short.txt has 1 token; .* at least 2; give a longer text"),
    "split": ({"text": ("words.txt", "rows.jsonl"), "split": "test"}, "words.txt, rows.jsonl has no split 'test'"),
    "column": ({"text": ("words.txt", "pydoc"), "column": "body"}, "has no column 'body'; only tables and Hub"),
    "pydoc": ({"text": ("words.txt", "pydoc"), "split": "dev"}, "pydoc has no split 'dev'"),
    "rows": ({"text": "rows.jsonl", "column": "prose"}, "rows.jsonl has no column 'prose'; its columns: text, body"),
    "window": ({"text": "pydoc", "window": 257}, "257 tokens is longer than the model's context; .* is 256"),
    "stride": ({"text": "pydoc", "window": 32, "stride": 33}, "stride 33 is larger than the window"),
    "narrow": ({"model": "narrow", "text": "words.txt"}, "the model's vocabulary has 32 entries"),
    "baseline": ({"baseline": "narrow", "text": "words.txt"}, "the baseline's vocabulary has 32 entries"),
    "wide": ({"baseline": "wide", "text": "words.txt"}, "the baseline's vocabulary has 160 entries, the model's 128"),
    "foreign": ({"baseline": "foreign", "text": "words.txt"}, r"the baseline reads 'words\.txt' by another tokenizer"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_text_is_refused_before_a_model_is_loaded(place: Path, case: str, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(compare, "load_model", fail)
    settings, says = REFUSALS[case]
    with pytest.raises(TransmlaError, match=says) as refused:
        measured(**{"window": 64, **settings})
    assert "\n" not in str(refused.value)


def test_a_baseline_needs_no_tokenizer(place: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(place / "baseline" / name, tmp_path)
    alone = measured(baseline=str(tmp_path), text="words.txt", window=64)
    assert alone["mean"] == measured(text="words.txt", window=64)["mean"]


def test_a_dtype_is_refused_before_a_text_is_read(place: Path) -> None:
    with pytest.raises(TransmlaError, match="dtype 'float16' is not supported"):
        evaluate_models("model", None, Evaluation(text="nowhere.txt"), dtype="float16", reporter=Silent())


def test_a_conversion_checks_its_texts_first(place: Path) -> None:
    named = {"source": "model", "output": "out"}
    check_evaluation(Recipe(**named))
    check_evaluation(Recipe(**named, eval={"text": ["words.txt", "pydoc"], "window": 64}))
    with pytest.raises(TransmlaError, match=r"no file nowhere\.txt"):
        check_evaluation(Recipe(**named, eval={"text": ["words.txt", "nowhere.txt"]}))
    with pytest.raises(TransmlaError, match="longer than the source's context"):
        check_evaluation(Recipe(**named, eval={"text": "pydoc", "window": 300}))


def test_the_table_has_a_row_per_text_and_the_mean(place: Path) -> None:
    result = measured("bos", text=("words.txt", "pydoc"), window=48, max_windows=3)
    rows = table_rows(result)
    assert [row[0] for row in rows] == ["words.txt", "pydoc (test)", "mean"]
    assert {len(row) for row in rows} == {len(table_columns(result))} == {5}
    for values, row in zip([*result["texts"], result["mean"]], rows, strict=True):
        assert row[1] == f"{values['perplexity']:.2f} ± {values['perplexity_stderr']:.2f}"
        assert row[2] == f"{values['baseline_perplexity']:.2f} ± {values['baseline_perplexity_stderr']:.2f}"
        assert row[3] == f"{values['kl']:.4f} ± {values['kl_stderr']:.4f}"
        assert row[4] == f"{values['top1_agreement']:.1%}".replace(
            "%", f" ± {100 * values['top1_agreement_stderr']:.1f} %"
        )
    assert "Windows: 3 × 48 tokens per text. Every window starts with BOS." in caption(result)


def test_the_table_without_a_baseline_and_with_uneven_windows(place: Path) -> None:
    result = measured(baseline=None, text=("words.txt", "pydoc"), window=250, stride=200)
    rows = table_rows(result)
    assert {len(row) for row in rows} == {len(table_columns(result))} == {2}
    assert "words.txt: 1 × " in caption(result)
    assert re.search(r"pydoc \(test\): [\d,]+ × 250 tokens, stride 200\. Windows do not", caption(result))
    assert "±" not in rows[0][1]  # a single window
    assert "±" in rows[1][1]
    assert "±" not in rows[2][1]


def test_the_report_holds_the_table_and_figures(place: Path, tmp_path: Path) -> None:
    result = measured(text=("words.txt", "pydoc"), window=48, max_windows=3)
    page = tmp_path / "report.html"
    write_evaluation(result, page, [Section("Tasks <b>", "<p>others</p>")])
    text = page.read_text(encoding="utf-8")
    for row in table_rows(result):
        assert all(f"<td>{cell}</td>" in text for cell in row)
    pictures = re.findall(r'src="data:image/png;base64,([\w+/=]+)"', text)
    assert [len(picture) > 10_000 for picture in pictures] == [True, True]
    assert [*re.findall(r"<h2>(.*)</h2>", text)] == ["Texts", "KL by text", "KL by position", "Tasks &lt;b&gt;"]
    assert all(fact in text for fact in ("<dd>model</dd>", "<dd>baseline</dd>", "cpu, float32", "transformers 5"))
    assert "<p>others</p>" in text
    assert not re.search(r'(src|href)="(?!data:)', text)

    write_evaluation(measured(baseline=None, text="words.txt", window=48), page)
    text = page.read_text(encoding="utf-8")
    assert [*re.findall(r"<h2>(.*)</h2>", text)] == ["Texts"]
    assert "<dd>none</dd>" in text


def test_the_card_shows_all_texts_and_a_file_keeps_the_result(
    make_source: Callable[..., Path], make_recipe: Callable[..., Recipe], text_file: Path
) -> None:
    from transmla.convert.pipeline import convert

    source = make_source(num_hidden_layers=3)
    texts = {"text": [str(text_file), "pydoc"], "window": 64, "max_windows": 3}
    recipe = make_recipe(source, cache_ratio=0.5, eval=texts)
    export = convert(recipe)
    assert "## Evaluation" not in (export / "README.md").read_text(encoding="utf-8")
    result = evaluate_export(export, recipe, Silent())

    card = (export / "README.md").read_text(encoding="utf-8")
    assert "| text.txt | " in card
    assert "not evaluated" not in card
    assert all(" | ".join(row[1:]) in card for row in table_rows(result))
    assert "Windows: 3 × 64 tokens per text. Windows do not start with BOS." in card
    kept = json.loads((export / "evaluation.json").read_text(encoding="utf-8"))
    assert [text["text"] for text in kept["texts"]] == ["text.txt", "pydoc"]
    assert kept["mean"] == result["mean"]
    assert kept["texts"][1] == result["texts"][1]
    assert all(str(source.parent) not in text for text in (card, json.dumps(kept)))
    assert all(check.passed for check in verify(export))
    assert "evaluation.json" in [file.path for file in list_files(export)]
