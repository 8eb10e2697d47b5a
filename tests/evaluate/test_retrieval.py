"""Retrieval: exact prompts, an oracle that copies, a random model, and contexts that are too short."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_sources import build_model, build_tokenizer
from torch import Tensor, nn
from typer.testing import CliRunner

from transmla.cli.app import build
from transmla.cli.score_report import retrieval_section
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.evaluate.retrieval import Cell, Retrieval, choose_lengths, depths_of, find_keys, greedy
from transmla.evaluate.retrieval_prompts import ANSWER_ROOM, PAIRS, PromptWriter
from transmla.evaluate.settings import RetrievalSettings
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.reporter import Silent

LENGTH = 768  # tokens; the tiny tokenizer splits nearly into characters


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    build_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


class Output(SimpleNamespace):
    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class Oracle(nn.Module):
    """A model that repeats what followed the last tokens of the prompt before; its cache is the tokens read."""

    device = torch.device("cpu")

    def __init__(self, question: int, vocabulary: int = 128) -> None:
        super().__init__()
        self.question, self.vocabulary = question, vocabulary

    def forward(self, tokens: Tensor, **kwargs: Any) -> Output:
        read = torch.cat([kwargs.get(CACHE_ARGUMENT, tokens[:, :0]), tokens], dim=1)
        logits = torch.zeros(len(read), 1, self.vocabulary)
        for row, line in zip(logits, read.tolist(), strict=True):
            tail = line[-self.question :]
            starts = [i for i in range(len(line) - self.question) if line[i : i + self.question] == tail]
            row[0, line[starts[-1] + self.question] if starts else 0] = 1
        return Output(logits=logits, **{CACHE_ARGUMENT: read})


def settings(**changes: Any) -> RetrievalSettings:
    return RetrievalSettings(**{"retrieval": True, "retrieval_depths": 3, "retrieval_samples": 2, **changes})


@pytest.mark.parametrize("kind", PAIRS)
def test_prompts_have_the_exact_length_and_the_key_at_its_depth(tokenizer: Any, kind: str) -> None:
    writer = PromptWriter(tokenizer, 2 * LENGTH, 0)
    longest_line = max(map(len, writer.filler))
    for length in (LENGTH, LENGTH + 1, 2 * LENGTH):
        for depth in (0.0, 0.3, 0.5, 1.0):
            prompt = writer.write(kind, length, depth, 0)
            assert len(prompt.tokens) == length - ANSWER_ROOM
            text = tokenizer.decode(prompt.tokens)
            assert text.startswith("Remember the pass keys in this text.\n")
            assert text.count("The pass key for") == PAIRS[kind] + 1
            question = text[text.rindex("The pass key for") :]
            pair = f"{question} {prompt.key}.\n"
            assert text.count(pair) == 1
            before, after = (len(tokenizer(part)["input_ids"]) for part in text.split(pair))
            others = sum(len(tokenizer(line)["input_ids"]) + 1 for line in text.splitlines() if "pass key for" in line)
            # The head stands before the pair, the question after it; other pairs stand anywhere.
            before -= len(writer.head)
            after -= len(tokenizer(question)["input_ids"])
            assert abs(before - depth * (before + after)) <= longest_line + (others if kind == "multi-key" else 0)


def test_prompts_depend_on_nothing_but_their_numbers(tokenizer: Any) -> None:
    first, again, other = (PromptWriter(tokenizer, LENGTH, seed) for seed in (0, 0, 1))
    assert first.write("passkey", LENGTH, 0.5, 3) == again.write("passkey", LENGTH, 0.5, 3)
    assert first.write("passkey", LENGTH, 0.5, 3) != first.write("passkey", LENGTH, 0.5, 4)
    assert first.write("passkey", LENGTH, 0.5, 3) != other.write("passkey", LENGTH, 0.5, 3)


def test_prompts_begin_with_bos_where_the_tokenizer_adds_it(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    prompt = PromptWriter(tokenizer, LENGTH, 0).write("passkey", LENGTH, 0.5, 0)
    assert prompt.tokens[0] == 0
    assert prompt.tokens.count(0) == 1
    assert len(prompt.tokens) == LENGTH - ANSWER_ROOM


def test_an_oracle_finds_all_keys_and_a_random_model_none(tokenizer: Any) -> None:
    oracle = Oracle(question=len(" for Berlin is"))  # longer than the answer, so that it matches inside the pair
    cells = list(find_keys(oracle, tokenizer, settings(), [LENGTH, 2 * LENGTH], name="oracle", reporter=Silent()))
    assert [(c.kind, c.length, c.depth) for c in cells[:4]] == [
        ("passkey", LENGTH, 0.0),
        ("passkey", LENGTH, 0.5),
        ("passkey", LENGTH, 1.0),
        ("multi-key", LENGTH, 0.0),
    ]
    assert all(cell.correct == cell.prompts == 2 for cell in cells)
    assert len(cells) == 2 * 2 * 3
    model = build_model(num_hidden_layers=1, max_position_embeddings=1024)
    cells = list(find_keys(model, tokenizer, settings(), [LENGTH], name="random", reporter=Silent()))
    assert sum(cell.correct for cell in cells) == 0


def test_greedy_is_that_of_generate() -> None:
    model = build_model()
    tokens = torch.randint(2, 128, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = model.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, 20:]
    assert torch.equal(greedy(model, tokens, 5), expected)


def test_memory_that_is_too_small_leaves_a_length_out(tokenizer: Any) -> None:
    class Small(Oracle):
        def forward(self, tokens: Tensor, **kwargs: Any) -> Output:
            if tokens.shape[0] * tokens.shape[1] > 2 * LENGTH:
                raise torch.OutOfMemoryError
            return super().forward(tokens, **kwargs)

    small = Small(question=14)
    cells = list(find_keys(small, tokenizer, settings(), [LENGTH, 3 * LENGTH], name="small", reporter=Silent()))
    assert {cell.length for cell in cells} == {LENGTH}
    assert all(cell.correct == cell.prompts for cell in cells)


def result() -> Retrieval:
    cells = {
        role: tuple(Cell(kind, 1024, depth, right, 4) for kind in PAIRS for depth in (0.0, 1.0))
        for role, right in (("model", 3), ("baseline", 4))
    }
    return Retrieval("m", "b", (0.0, 1.0), 4, 0, cells, 1.0)


def test_rows_have_rates_errors_and_the_share_kept() -> None:
    row = result().rows()[0]
    assert row.model is not None
    assert (row.kind, row.length, row.model.value, row.kept) == ("passkey", 1024, 0.75, 0.75)
    assert row.model.stderr == pytest.approx((0.75 * 0.25 / 7) ** 0.5)
    found = json.loads(json.dumps(result().to_dict()))
    assert found["rows"][1]["kind"] == "multi-key"
    assert found["rows"][1]["baseline"] == {"value": 1.0, "stderr": 0.0}


def test_the_report_has_the_table_and_the_heat_map() -> None:
    section = retrieval_section(result())
    assert section.title == "Retrieval"
    assert (
        "<td>passkey</td><td>1,024</td><td>8</td><td>0.750 ± 0.164</td><td>1.000 ± 0.000</td><td>75.0%</td>"
        in section.html
    )
    assert 'src="data:image/png;base64,iVBOR' in section.html


def test_a_length_above_the_context_is_refused_before_loading(make_source: Callable[..., Path]) -> None:
    source = make_source(max_position_embeddings=2048)
    (source / "model.safetensors").unlink()
    assert choose_lengths(str(source), None, settings()) == (1024, 2048)
    assert choose_lengths(str(source), None, settings(retrieval_length=(512, 300))) == (300, 512)
    with pytest.raises(TransmlaError, match=r"4096 tokens is longer than the context of .* is 2048"):
        choose_lengths(str(source), None, settings(retrieval_length=(1024, 4096)))


def test_a_length_too_short_for_the_pairs_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TransmlaError, match=r"a retrieval prompt of 150 tokens is too short; .* need"):
        PromptWriter(tokenizer, 256, 0).write("multi-key", 150, 0.5, 0)


def test_depths_are_evenly_spaced() -> None:
    assert depths_of(3) == (0.0, 0.5, 1.0)
    assert depths_of(1) == (0.5,)


def test_the_command_line_measures_source_and_export(
    make_source: Callable[..., Path], make_recipe: Any, tmp_path: Path
) -> None:
    source = make_source(max_position_embeddings=1024)
    export = convert(make_recipe(source, cache_ratio=0.5))
    argv = ["eval", str(export), "--baseline", str(source), "--retrieval", "--retrieval-length", "512"]
    argv += ["--retrieval-depths", "2", "--retrieval-samples", "1", "--device", "cpu"]
    done = CliRunner().invoke(build(), [*argv, "--json", "--retrieval-plot", str(tmp_path / "map.png")])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert set(found) == {"retrieval"}
    assert [(row["kind"], row["length"]) for row in found["retrieval"]["rows"]] == [
        ("passkey", 512),
        ("multi-key", 512),
    ]
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_scores_without_a_figure_need_no_matplotlib(
    make_source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(max_position_embeddings=1024)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["eval", str(source), "--retrieval", "--retrieval-length", "512", "--retrieval-depths", "1"]
    done = CliRunner().invoke(build(), [*argv, "--retrieval-samples", "1", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)) == {"retrieval"}


def test_flags_of_retrieval_need_retrieval(tmp_path: Path) -> None:
    for flags, says in (
        (["--retrieval-plot", "map.png"], "--retrieval-plot has no effect here; add --retrieval"),
        (["--retrieval", "--retrieval-plot", "map.svg"], "a figure is a .png file"),
        (["--retrieval", "--retrieval-length", "20"], "input should be greater than or equal to 256"),
    ):
        done = CliRunner().invoke(build(), ["eval", str(tmp_path), *flags])
        assert isinstance(done.exception, TransmlaError)
        assert says in str(done.exception)
