"""Mixtures of texts: rows in their shares, what ``auto`` is, options of texts, and what samples continue."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from helpers.byte_tokenizer import CHATML, byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transmla.convert.fit_layers import held_out
from transmla.convert.prepare import AMOUNTS
from transmla.errors import TransmlaError
from transmla.reporter import Silent
from transmla.shares import shares
from transmla.source import mixture
from transmla.source.mixture import (
    LONGEST_OPENING,
    SHORTEST_OPENING,
    WITH_HUB,
    WITHOUT_HUB,
    Part,
    interleave,
    openings,
    order,
    parts_of,
    read_rows,
    turns,
)
from transmla.source.openings import ENGLISH, LANGUAGES, PROMPTS
from transmla.source.text import load_blocks
from transmla.source.texts import hub


class Messages(Silent):
    """A reporter that keeps the lines of text."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def german() -> PreTrainedTokenizerFast:
    """A tokenizer that serves English and German."""
    return byte_tokenizer([*ENGLISH, *LANGUAGES["German"], *filter(str.isascii, PROMPTS)])


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    other.chat_template = template
    return other


@pytest.mark.parametrize(
    "entries", [WITH_HUB, WITHOUT_HUB, ("a",), ("a", "b"), ("a:0.9", "b"), ("a:0.5", "b:0.3", "c")], ids=str
)
def test_every_prefix_of_rows_is_within_a_row_of_its_shares(entries: tuple[str, ...]) -> None:
    wanted = list(shares(entries).values())
    counts = [0] * len(wanted)
    for rows, index in enumerate(itertools.islice(turns(wanted), 2000), 1):
        counts[index] += 1
        assert max(abs(share * rows - count) for share, count in zip(wanted, counts, strict=True)) <= 1


def test_arbitrary_shares_are_never_two_rows_behind() -> None:
    generator = random.Random(0)
    for _ in range(20):
        weights = [generator.random() ** 4 for _ in range(generator.randint(2, 10))]
        wanted = [weight / sum(weights) for weight in weights]
        counts = [0] * len(wanted)
        for rows, index in enumerate(itertools.islice(turns(wanted), 500), 1):
            counts[index] += 1
            assert all(-2 < n - share * rows < 1 for share, n in zip(wanted, counts, strict=True))


def test_rows_are_interleaved_in_order() -> None:
    parts = (Part("a", 0.5), Part("b", 0.25), Part("c", 0.25))
    chosen = order(parts, 8)
    assert Counter(chosen) == {0: 4, 1: 2, 2: 2}
    texts = {part.name: torch.arange(chosen.count(i))[:, None] + 10 * i for i, part in enumerate(parts)}
    rows = interleave(parts, texts, 8).flatten().tolist()
    assert [row // 10 for row in rows] == chosen
    assert [sorted(row % 10 for row in rows if row // 10 == i) for i in range(3)] == [[0, 1, 2, 3], [0, 1], [0, 1]]


@pytest.mark.parametrize("mixture", [WITH_HUB, WITHOUT_HUB], ids=["hub", "no hub"])
def test_the_fit_judges_on_every_text_of_the_default_mixture(mixture: tuple[str, ...]) -> None:
    parts = [Part(name, share) for name, share in shares(mixture).items()]
    sequences, _ = AMOUNTS["cuda"]
    chosen = order(parts, sequences)
    assert set(chosen[-held_out(sequences) :]) == set(range(len(parts)))
    for rows in (16, 32, sequences):  # the other rows still hold the texts in their shares
        counts = Counter(chosen[:rows])
        assert all(abs(counts[i] - part.share * rows) < 2 for i, part in enumerate(parts))


def test_auto_without_a_hub_says_so_in_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    report = Messages()
    parts = parts_of(("auto",), tokenizer, report=report)
    assert {part.name: part.share for part in parts} == pytest.approx(shares(WITHOUT_HUB))
    (line,) = report.lines
    assert line.startswith("auto text: self 60%, stdlib 18%, packages 17%, pydoc 5%")
    assert "Hub is out of reach" in line
    assert "\n" not in line
    parts_of(("pydoc", "self"), tokenizer, report=report)
    assert len(report.lines) == 1


@pytest.mark.parametrize("hub", [False, True])
def test_auto_of_a_model_that_cannot_be_sampled_has_no_samples(
    hub: bool, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture, "hub_is_reachable", lambda: hub)
    report = Messages()
    whole = {part.name: part.share for part in parts_of(("auto",), tokenizer, report=Messages())}
    parts = {part.name: part.share for part in parts_of(("auto",), tokenizer, report=report, unsampled="too large")}
    assert parts == pytest.approx({n: share / (1 - whole["self"]) for n, share in whole.items() if n != "self"})
    (line,) = report.lines
    assert "no samples: too large" in line
    assert "self" not in line
    with pytest.raises(TransmlaError, match="cannot be sampled; too large; leave `self` out"):
        parts_of(("pydoc", "self"), tokenizer, report=report, unsampled="too large")


def test_auto_with_a_hub_streams_pinned_revisions(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    chatting = with_template(tokenizer, CHATML)
    opened: dict[tuple[str, str | None], str] = {}

    def load_dataset(path: str, name: str | None, *, split: str, revision: str, streaming: bool) -> Iterator[Any]:
        assert streaming
        assert len(revision) == 40
        assert int(revision, 16)
        opened[path, name] = split
        prose = {"text": f"{path} {name} " * 50, "solution": "return 1\n" * 50}
        chat = [{"role": "user", "content": "Why? "}, {"role": "assistant", "content": "Because. "}]
        return iter([{"id": 1, **({"messages": chat} if "ultrachat" in path else prose)}] * 300)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(mixture, "hub_is_reachable", lambda: True)
    report = Messages()
    parts = parts_of(("auto",), chatting, report=report)
    assert {part.name: part.share for part in parts} == pytest.approx(shares(WITH_HUB))
    assert len(report.lines) == 1
    assert "out of reach" not in report.lines[0]
    rows = read_rows(parts, chatting, sequences=80, length=32, vocabulary=len(tokenizer))
    assert opened == {
        ("wikimedia/wikipedia", "20231101.en"): "train",
        ("emozilla/pg19", None): "validation",
        ("ise-uiuc/Magicoder-OSS-Instruct-75K", None): "train",
        ("HuggingFaceH4/ultrachat_200k", None): "train_sft",
        **{("wikimedia/wikipedia", f"20231101.{language}"): "train" for language in ("de", "es", "fr", "zh")},
    }
    assert "return 1" in tokenizer.decode(rows["magicoder"][0])
    assert "<|assistant|>Because." in tokenizer.decode(rows["ultrachat"].flatten())
    assert set(rows) == set(shares(WITH_HUB)) - {"self"}


def test_auto_has_no_chats_for_a_model_without_a_template_for_them(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture, "hub_is_reachable", lambda: True)
    assert "ultrachat" in [part.name for part in parts_of(("auto",), with_template(tokenizer, CHATML), report=Silent())]
    for other in (tokenizer, with_template(tokenizer, "{{ raise_exception('no chats') }}")):
        parts = {part.name: part.share for part in parts_of(("auto",), other, report=Silent())}
        assert set(parts) == set(shares(WITH_HUB)) - {"ultrachat"}
        assert parts["pg19"] == pytest.approx(0.15)
        assert sum(parts.values()) == pytest.approx(1)


@pytest.mark.parametrize("reason", ["none", "offline", "datasets offline", "error", "blocked"])
def test_whether_the_hub_can_be_read(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:

    def head(url: str, *, timeout: float) -> Any:
        assert url.startswith("http")
        assert timeout < 10
        if reason == "error":
            raise OSError("no route")
        return SimpleNamespace(status_code=403 if reason == "blocked" else 200)

    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", reason == "offline")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", reason == "datasets offline")
    assert hub.hub_is_reachable() == (reason == "none")


def test_auto_mixes_with_texts_that_it_holds_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    for entries in (("auto:0.5", "pydoc:0.5"), ("pydoc:0.5", "auto:0.5")):
        parts = {part.name: part for part in parts_of(entries, tokenizer, split="test", report=Silent())}
        assert sum(part.share for part in parts.values()) == pytest.approx(1)
        assert parts["pydoc"].share == pytest.approx(0.5 + 0.5 * shares(WITHOUT_HUB)["pydoc"])
        # The split is that of the text which the user names, not that of the other texts of auto.
        assert [name for name, part in parts.items() if part.split] == ["pydoc"]


def test_options_go_to_the_texts_that_take_them(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.csv").write_text("body\ntext")
    text, table = str(tmp_path / "a.txt"), str(tmp_path / "a.csv")
    parts = parts_of(
        (text, table, "self", "stdlib", "org/name"), tokenizer, split="test", column="body", report=Silent()
    )
    assert [(part.split, part.column) for part in parts] == [
        (None, None),
        (None, "body"),
        (None, None),
        ("test", None),
        ("test", "body"),
    ]


@pytest.mark.parametrize(
    ("entries", "options", "says"),
    [
        (("self",), {"split": "test"}, "self has no split 'test'; leave the split out"),
        (("auto",), {"split": "test"}, "auto has no split 'test'"),
        (("auto:0.5", "pydoc:0.5"), {"column": "body"}, "auto, pydoc has no column 'body'"),
        (("a.txt",), {"split": "test"}, "a.txt has no split 'test'"),
    ],
)
def test_options_that_no_text_takes_are_refused(
    entries: tuple[str, ...], options: dict[str, str], says: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(TransmlaError, match=says):
        parts_of(entries, tokenizer, **options, report=Silent())


def test_a_short_text_says_how_much_is_missing(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The amount is that of the text's share, and BOS counts in every row."""
    (tmp_path / "short.txt").write_text("a" * 50)
    short = str(tmp_path / "short.txt")
    parts = parts_of((f"{short}:0.5", "pydoc:0.5"), tokenizer, report=Silent())
    with pytest.raises(TransmlaError, match=r"has 50 tokens, 10 too few; 4 sequences of 16 tokens need 60"):
        read_rows(parts, tokenizer, sequences=8, length=16, vocabulary=len(tokenizer))
    rows = read_rows(parts, tokenizer, sequences=6, length=16, vocabulary=len(tokenizer))
    assert {name: tuple(text.shape) for name, text in rows.items()} == {short: (3, 16), "pydoc": (3, 16)}


def test_every_row_starts_with_bos_and_holds_no_other(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = load_blocks("pydoc", tokenizer, sequences=9, length=20)
    assert (blocks[:, 0] == tokenizer.bos_token_id).all()
    assert not (blocks[:, 1:] == tokenizer.bos_token_id).any()
    without = load_blocks("pydoc", byte_tokenizer(bos=False), sequences=9, length=19)
    assert torch.equal(blocks[0, 1:], without[0])


def test_a_token_outside_the_vocabulary_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TransmlaError, match=r"'pydoc' holds token .*; the model's vocabulary has 9 entries"):
        read_rows((Part("pydoc", 1.0),), tokenizer, sequences=2, length=16, vocabulary=9)


def decoded(found: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> set[str]:
    assert all(tokens[0] == tokenizer.bos_token_id for tokens in found)
    assert all(tokens.count(tokenizer.bos_token_id) == 1 for tokens in found)
    return {tokenizer.decode(tokens[1:]) for tokens in found}


def test_written_openings_are_in_the_languages_that_the_tokenizer_serves(
    tokenizer: PreTrainedTokenizerFast, german: PreTrainedTokenizerFast
) -> None:
    assert decoded(openings({}, tokenizer, seed=0), tokenizer) == set(ENGLISH)
    served = decoded(openings({}, german, seed=0), german)
    assert set(ENGLISH) | set(LANGUAGES["German"]) <= served
    assert not any(served & set(LANGUAGES[language]) for language in ("Russian", "Chinese", "Japanese", "Hindi"))


def test_chat_prompts_need_a_template_that_accepts_them(german: PreTrainedTokenizerFast) -> None:
    template = "{{ bos_token }}" + CHATML + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    plain = decoded(openings({}, german, seed=0), german)
    chatting = with_template(german, template)
    chats = decoded(openings({}, chatting, seed=0), chatting) - plain
    assert "<|user|>What happened in 1969?\n<|assistant|>" in chats
    assert not any(prompt in chat for chat in chats for prompt in PROMPTS if "中" in prompt or "日" in prompt)
    system_only = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    for template in (system_only, "{{ nonsense( }}"):
        strict = with_template(german, template)
        assert decoded(openings({}, strict, seed=0), strict) == plain
    strict.chat_template = {"tool_use": CHATML}
    assert decoded(openings({}, strict, seed=0), strict) == plain


def test_openings_alternate_between_written_ones_and_beginnings_of_the_texts(
    german: PreTrainedTokenizerFast,
) -> None:
    texts = {
        "pydoc": load_blocks("pydoc", german, sequences=30, length=200),
        "stdlib": load_blocks("stdlib", german, sequences=10, length=200),
    }
    found = openings(texts, german, seed=0)
    assert found == openings(texts, german, seed=0)
    assert found != openings(texts, german, seed=1)
    written, real = found[::2], found[1::2]
    known = set(ENGLISH) | {text for texts in LANGUAGES.values() for text in texts}
    assert decoded(written, german) <= known
    lengths = [len(tokens) - 1 for tokens in real]
    assert SHORTEST_OPENING <= min(lengths) < max(lengths) <= LONGEST_OPENING
    assert len(real) == 60
    for i, tokens in enumerate(real):  # in turn from both texts
        rows = texts["pydoc" if i % 2 == 0 else "stdlib"].tolist()
        row = rows[i // 2 % len(rows)]
        assert any(row[j : j + len(tokens) - 1] == tokens[1:] for j in range(1, len(row)))


@pytest.mark.parametrize("length", [2, 3, 9])
def test_short_rows_have_openings_too(length: int, german: PreTrainedTokenizerFast) -> None:
    real = openings({"pydoc": load_blocks("pydoc", german, sequences=4, length=length)}, german, seed=0)[1::2]
    assert all(1 < len(tokens) <= max(2, length // 2 + 1) for tokens in real)


def test_small_vocabularies_have_no_written_openings() -> None:
    """A tokenizer that replaces or drops letters would give openings without meaning."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "word": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    replacing = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", bos_token="<s>")
    dropping = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    for small in (replacing, dropping):
        small.chat_template = CHATML
        assert openings({}, small, seed=0) == []
        rows = torch.arange(2).repeat(3, 10)
        assert len(openings({"text": rows}, small, seed=0)) == 3
