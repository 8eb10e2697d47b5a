"""``transmla eval`` and ``convert --eval`` on several texts: tables, JSON, report and one-line errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from helpers.command_line import Run
from helpers.tiny_sources import build_model, build_tokenizer

from transmla.cli import console
from transmla.recipe import parse_recipe, read_recipe

TEXTS = ["--text", "first.txt", "--text", "second.txt"]
WINDOWS = ["--window", "48", "--max-windows", "3"]
CONVERT = ["convert", "source", "-o", "out", "--reconstruct", "off", "--calibration", "first.txt"]
CONVERT += ["--calibration-sequences", "4", "--calibration-length", "32"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    build_model(num_hidden_layers=3).save_pretrained(folder / "source")
    build_tokenizer(folder / "source")
    (folder / "first.txt").write_text("the cat sat on the mat and the dog sat on the log " * 30)
    (folder / "second.txt").write_text("a big red sun ran far and saw the mat " * 30)
    return folder


def test_one_table_has_a_row_per_text_and_the_mean(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "width", 120)
    code, out, err = run("eval", "source", "--baseline", "source", *TEXTS, *WINDOWS, "--report", "page.html")
    assert code == 0
    rows = re.findall(r"│ (\S+) +│ +([\d.]+) ± [\d.]+ │ +[\d.]+ ± [\d.]+ │ +(\S+) ± \S+ │ +(\S+) ± 0.0 % │", out)
    assert [row[0] for row in rows] == ["first.txt", "second.txt", "mean"]
    assert [row[3] for row in rows] == ["100.0"] * 3
    assert all(abs(float(row[2])) < 1e-4 for row in rows)
    assert "Windows: 3 × 48 tokens per text. Windows do not start with BOS." in out
    assert "6/6" in err
    assert "wrote page.html" in err
    page = Path("page.html").read_text(encoding="utf-8")
    assert rows[0][1] in page
    assert page.count("data:image/png;base64,") == 2


def test_results_that_rest_on_too_little_have_a_note(place: Path, run: Run) -> None:
    Path("short.txt").write_text("the cat sat")
    Path("long.txt").write_text("the cat sat on the mat and the dog sat on the log " * 150)
    code, _, err = run("eval", "source", "--text", "short.txt", "--text", "long.txt", "--window", "64")
    assert code == 0
    said = " ".join(err.split())
    assert "note: the numbers of short.txt rest on 2 predicted tokens; take a text that gives 1,000 or more" in said
    assert "of long.txt rest" not in said
    few = ["--retrieval", "--retrieval-length", "256", "--retrieval-depths", "1", "--retrieval-samples"]
    assert "note: each rate rests on 2 prompts, which" in " ".join(run("eval", "source", *few, "2")[2].split())
    assert "note: each rate" not in run("eval", "source", *few, "20")[2]


def test_json_holds_every_number(place: Path, run: Run) -> None:
    code, out, _ = run("eval", "source", *TEXTS, *WINDOWS, "--json")
    found = json.loads(out)
    assert code == 0
    assert [text["text"] for text in found["texts"]] == ["first.txt", "second.txt"]
    assert {"perplexity", "perplexity_stderr", "nll", "positions", "starts_with_bos"} <= set(found["texts"][0])
    assert found["mean"]["nll"] == pytest.approx(sum(text["nll"] for text in found["texts"]) / 2)
    assert (found["model"], found["baseline"], found["device"], found["dtype"]) == ("source", None, "cpu", "float32")
    assert "torch" in found["versions"]


@pytest.mark.parametrize("flag", ["--eval", "--eval-text"])
def test_a_conversion_compares_on_several_texts(place: Path, run: Run, flag: str) -> None:
    texts = [flag, "first.txt", "--eval-text", "second.txt", "--eval-window", "48", "--eval-max-windows", "3"]
    code, out, _ = run(*CONVERT, *texts)
    assert code == 0
    assert out.count("│ mean ") == 1
    assert "cache values per token and layer" in out
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\S+) \| [\d.]+ ± ", card, re.MULTILINE) == ["first.txt", "second.txt", "mean"]
    assert json.loads(Path("out/evaluation.json").read_text())["texts"][1]["windows"] == 3
    assert read_recipe(Path("out/recipe.yaml"), {}).eval.text == ("first.txt", "second.txt")
    assert run("verify", "out")[0] == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*CONVERT, "--eval", "first.txt", "--eval", "nowhere.txt"], "no file nowhere.txt"),
        ([*CONVERT, "--eval", "self"], "the text 'self' is no text to evaluate on"),
        ([*CONVERT, "--eval", "first.txt", "--eval-window", "300"], "longer than the source's context"),
        ([*CONVERT, "--eval", "first.txt", "--eval-split", "test"], "first.txt has no split 'test'"),
        (["eval", "source", *TEXTS, "--text", "first.txt"], "text: value error, a text is given twice"),
        (["eval", "source", "--text", "first.txt", "--text", "self"], "the text 'self' is no text to evaluate on"),
        (["eval", "source", "--text", "first.txt", "--text", "nowhere.txt"], "no file nowhere.txt"),
        (["eval", "source", *TEXTS, "--column", "body"], "has no column 'body'; only tables and Hub datasets have a"),
        (["eval", "source", *TEXTS, "--report", "page.png"], "a figure is a .html file"),
        (["eval", "source", *TEXTS, "--report", "nowhere/page.html"], "a figure is written into an existing folder"),
    ],
)
def test_a_bad_text_is_one_line_before_any_work(
    place: Path, run: Run, argv: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr("transmla.evaluate.compare.load_model", fail)
    monkeypatch.setattr("transmla.convert.pipeline.convert", fail)
    code, out, err = run(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert not list(Path().glob("out*"))


def test_the_recipe_takes_one_text_or_several() -> None:
    named = {"source": "source", "output": "out"}
    texts = {"pydoc": ("pydoc",), "[pydoc, a.txt]": ("pydoc", "a.txt")}
    for written, expected in texts.items():
        values = yaml.safe_load(f"eval: {{text: {written}}}")
        assert parse_recipe(named | values, "test").eval.text == expected
    assert parse_recipe(named | {"eval": {}}, "test").eval.text == ("pydoc",)
