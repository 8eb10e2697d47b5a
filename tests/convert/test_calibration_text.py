"""Texts of a conversion: refused before a model is loaded, recorded in manifest and card, kept by a resumed run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from helpers.interrupted import Killed, KilledAtLayer, files
from helpers.tiny_sources import build_model

from transmla.convert.calibration_text import MEMORY_SHARE, why_unsampled
from transmla.convert.pipeline import convert
from transmla.convert.prepare import default_amounts, prepare, summarise
from transmla.errors import TransmlaError
from transmla.export.manifest import Manifest
from transmla.recipe import Recipe, parse_recipe, read_recipe
from transmla.reporter import Silent
from transmla.source.describe import describe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def source(make_source: Callable[..., Path]) -> Path:
    return make_source()


def fail(*_: Any, **__: Any) -> None:
    raise AssertionError("called too early")


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        ({"source": "nowhere.csv"}, "no file nowhere.csv"),
        ({"source": ["self", "nowhere.csv"]}, "no file nowhere.csv"),
        ({"source": "chats.jsonl"}, "chats.jsonl holds chats, but this model's tokenizer has no chat template"),
        ({"source": ["chats.jsonl:0.1", "self:0.9"], "sequences": 16}, "has no chat template"),
        ({"source": "."}, "is a folder, not a text; it holds chats.jsonl, text.txt; name one of its files"),
        ({"source": ["self:0.5", "text.txt"], "sequences": 1000}, "text.txt has .* too few; 500 sequences of 48"),
        ({"source": ["self", "auto"], "column": "body"}, "self, auto has no column 'body'"),
        ({"source": "pydoc", "split": "validation"}, "pydoc has no split 'validation'"),
        ({"length": 257}, "longer than the source's context; at most 256"),
    ],
    ids=str,
)
def test_texts_are_refused_before_a_model_is_loaded(
    calibration: dict[str, Any],
    says: str,
    source: Path,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello?"}]}))
    for file in (source / "chat_template.jinja", source / "tokenizer_config.json"):
        if file.suffix == ".jinja":
            file.unlink(missing_ok=True)
        else:
            config = json.loads(file.read_text())
            config.pop("chat_template", None)
            file.write_text(json.dumps(config))
    monkeypatch.setattr("transmla.convert.calibration_text.load_model", fail)
    monkeypatch.setattr("transmla.source.checkpoint.Checkpoint.fingerprint", fail)
    with pytest.raises(TransmlaError, match=says) as caught:
        convert(make_recipe(source, calibration=calibration))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (["a.txt:0.5", "b.txt:0.4"], "calibration.source: .*sum to 0.9"),
        (["a.txt:1", "b.txt"], "leave nothing for the texts without a weight"),
        (["a.txt:2", "b.txt"], "must be above 0 and at most 1"),
        ([], "at least one text"),
        ([0.5], "calibration.source.0: input should be a valid string"),
    ],
)
def test_impossible_weights_are_one_line(entries: list[Any], says: str) -> None:
    with pytest.raises(TransmlaError, match=says) as caught:
        parse_recipe({"source": "s", "output": "o", "calibration": {"source": entries}}, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "entries"),
    [
        ("pydoc", ("pydoc",)),
        ("[self:0.6, org/name:config:0.4]", ("self:0.6", "org/name:config:0.4")),
        ("[self: 0.6, pydoc]", ("self:0.6", "pydoc")),
        ("{self: 0.6, 'C:\\a.txt': 0.4}", ("self:0.6", "C:\\a.txt:0.4")),
        ("\n  - self: 0.6\n  - pydoc:", ("self:0.6", "pydoc")),
    ],
)
def test_a_recipe_may_write_weights_as_text_or_as_values(
    written: str, entries: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"source: s\noutput: o\ncalibration:\n  source: {written}\n")
    assert read_recipe(file, {}).calibration.source == entries
    changed = read_recipe(file, {"calibration": {"source": ["stdlib"]}})
    assert changed.calibration.source == ("stdlib",)


def test_manifest_and_card_record_the_shares(
    source: Path, make_recipe: MakeRecipe, text_file: Path, tmp_path: Path
) -> None:
    calibration = {"source": [f"{text_file}:0.75", "self"]}
    out = convert(make_recipe(source, calibration=calibration))
    assert json.loads((out / "transmla.json").read_text())["texts"] == {"text.txt": 0.75, "self": 0.25}
    card = (out / "README.md").read_text()
    assert "The text was 75% `text.txt`, 25% `self`." in card
    assert "text.txt:0.75" in card
    assert str(tmp_path) not in card


def test_auto_records_the_texts_that_have_rows(source: Path, make_recipe: MakeRecipe) -> None:
    out = convert(make_recipe(source, calibration={"source": "auto", "sequences": 3}))
    shares = json.loads((out / "transmla.json").read_text())["texts"]
    assert set(shares) < {"self", "stdlib", "pydoc", "packages"}
    assert shares["self"] == pytest.approx(2 / 3)
    assert sum(shares.values()) == pytest.approx(1)


def test_a_resumed_run_uses_the_saved_tokens_and_keeps_the_texts(
    source: Path, make_recipe: MakeRecipe, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transmla.convert.shard_writer.SAVE_SECONDS", 0)
    recipe = make_recipe(source, calibration={"source": [str(text_file), "self", "pydoc"]})
    expected = files(convert(recipe))
    (tmp_path / "out").rename(tmp_path / "before")
    with pytest.raises(Killed):
        convert(recipe, reporter=KilledAtLayer(1))
    text_file.unlink()
    monkeypatch.setattr("transmla.source.samples.sample_self", fail)
    monkeypatch.setattr("transmla.convert.pipeline.read_calibration", fail)
    assert files(convert(recipe, resume=True)) == expected


def test_the_default_amount_fits_the_context(make_source: Callable[..., Path], tmp_path: Path) -> None:
    values = {"output": str(tmp_path / "out"), "device": "cpu"}
    for context, sequences, length in ((256, 128, 256), (4096, 64, 512)):
        folder = make_source(name=f"source-{context}", max_position_embeddings=context)
        recipe = prepare(parse_recipe({"source": str(folder), **values}, "test")).recipe
        assert (recipe.calibration.sequences, recipe.calibration.length) == (sequences, length)


def test_a_softcap_shortens_the_default_sequences() -> None:
    """A softcap needs all scores of a sequence in memory."""
    for softcap, sequences, length in ((None, 64, 8192), (50.0, 128, 4096)):
        config = build_model("gemma2", attn_logit_softcapping=softcap, max_position_embeddings=16384).config
        assert default_amounts(describe(config), 80 * 10**9) == (sequences, length)


@pytest.mark.parametrize(("gigabytes", "amounts"), [(141, (64, 8192)), (80, (64, 8192)), (24, (64, 2048))])
def test_a_gpu_with_little_memory_gets_shorter_sequences(gigabytes: int, amounts: tuple[int, int]) -> None:
    """The widths of Llama-3-8B."""
    tiny = describe(build_model(max_position_embeddings=8192).config)
    wide = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    spec = replace(tiny, **wide, head_dim=128, layer_parameters=3 * 4096 * 14336)
    assert default_amounts(spec, gigabytes * 10**9) == amounts


def test_the_plan_counts_the_memory_of_sampling(source: Path, make_recipe: MakeRecipe) -> None:
    """Sampling loads the whole source, so ``auto`` and ``self`` need as much memory, and ``pydoc`` needs less."""
    needed = {
        text: summarise(prepare(make_recipe(source, calibration={"source": text})))["memory_bytes"]
        for text in ("pydoc", "self", "auto", "auto:1")
    }
    assert needed["self"] == needed["auto"] == needed["auto:1"] >= needed["pydoc"]


def test_a_source_larger_than_the_memory_is_not_sampled(
    source: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auto`` then has no samples, and ``self`` is refused before a weight is loaded."""
    auto = make_recipe(source, calibration={"source": "auto"})
    prepared = prepare(auto)
    size = sum(math.prod(shape) for shape in prepared.source.checkpoint.shapes.values()) * 4
    enough = round(size / MEMORY_SHARE) + 100
    for free, sampled in ((enough, True), (enough - 200, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        reason = why_unsampled(prepared.source, torch.device("cpu"))
        assert (reason == "") == sampled, reason
    assert reason.startswith("the weights take 0 GB, and sampling may use 0 GB of free memory")
    summary = summarise(prepared)
    assert summary["unsampled"] == reason
    messages: list[str] = []
    report = Silent()
    report.message = messages.append  # type: ignore[method-assign]
    convert(auto, reporter=report)
    assert "no samples: the weights take" in messages[0]
    assert "self" not in Manifest.read(Path(auto.output)).texts
    with pytest.raises(TransmlaError, match="the source cannot be sampled"):
        convert(make_recipe(source, output="other", calibration={"source": "self"}))
