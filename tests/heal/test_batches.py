"""Texts of a healing: sequences with BOS, batches in shares, held-out sequences of every text, and refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.byte_tokenizer import byte_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from transmla.errors import TransmlaError
from transmla.heal import batches as texts
from transmla.heal.batches import Batches, TokenStream, make_batches, read_texts
from transmla.heal.checks import check_amount, check_same_texts
from transmla.heal.run import heal
from transmla.heal.settings import Healing
from transmla.reporter import Silent
from transmla.source.text import named_texts

BOS = 0


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def settings(**changes: Any) -> Healing:
    small = {"length": 8, "batch": 4, "held_out": 2, "max_tokens": 4000, "self_tokens": 800}
    return Healing(**{"student": "", "teacher": "", "output": "", **small, **changes})


def test_every_sequence_of_a_stream_starts_with_bos() -> None:
    stream = TokenStream("stream", torch.arange(1, 1001), length=11, held_out=5, seed=0, bos=BOS)
    assert stream.sequences == 94
    epoch = torch.stack([stream[i] for i in range(94)])
    assert epoch.shape == (94, 11)
    assert (epoch[:, 0] == BOS).all()
    assert (epoch[:, 1:].diff(dim=1) == 1).all()
    assert len(epoch[:, 1:].unique()) == 940
    assert (stream.held_out[:, 0] == BOS).all()
    assert stream.held_out[:, 1:].flatten().tolist() == list(range(951, 1001))
    assert int(epoch.max()) <= 950
    assert not torch.equal(stream[0], stream[94])


def test_rows_stay_whole_and_get_no_second_bos() -> None:
    rows = torch.arange(1, 81).view(8, 10)
    stream = TokenStream("rows", rows, length=10, held_out=2, seed=0, bos=BOS)
    assert sorted(stream[i].tolist() for i in range(6)) == rows[:6].tolist()
    assert torch.equal(stream.held_out, rows[6:])


def text_stream(index: int, share: float) -> TokenStream:
    """Return a stream in which every token is ``index``."""
    return TokenStream(str(index), torch.full((400,), index), length=8, held_out=3, seed=0, share=share)


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3], [0.97, 0.03]], ids=str)
def test_batches_hold_the_texts_in_their_shares_after_any_number_of_steps(weights: list[float]) -> None:
    mixed = Batches([text_stream(i, share) for i, share in enumerate(weights)], 4)
    counts = Counter[int]()
    for step in range(150):
        batch = mixed[step]
        assert batch.shape == (4, 8)
        counts.update(batch[:, 0].tolist())
        assert all(abs(counts[i] - share * 4 * (step + 1)) <= 1 for i, share in enumerate(weights))
    again = Batches(mixed.texts, 4)
    assert all(torch.equal(again[step], mixed[step]) for step in (149, 0, 70, 70))


def test_sequences_of_every_text_are_held_out() -> None:
    mixed = Batches([text_stream(i, share) for i, share in enumerate((0.9, 0.05, 0.05))], 4)
    assert mixed.held_out().shape == (9, 8)
    assert mixed.held_out()[:, 0].tolist() == [0, 1, 2] * 3


def test_the_fingerprint_sees_training_and_held_out_tokens() -> None:
    tokens = torch.arange(400)
    changed = [tokens.clone() for _ in range(2)]
    changed[0][5] = changed[1][-1] = 7
    streams = [TokenStream("t", t, length=8, held_out=3, seed=0) for t in (tokens, *changed)]
    assert len({Batches([stream], 4).fingerprint() for stream in streams}) == 3


def test_mixtures_are_read_in_their_shares(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is read for its share, and ``self`` continues both the other texts and written openings."""
    sampled: dict[str, Any] = {}

    def sample(teacher: Any, tokenizer: Any, begin: list[list[int]], *, rows: int, length: int, **_: Any) -> Tensor:
        sampled.update(begin=begin, rows=rows, length=length)
        return torch.full((rows, length), 9)

    monkeypatch.setattr(texts, "sampled_rows", sample)
    chosen = settings(data=("self:0.5", "pydoc:0.25", "stdlib:0.25"))
    texts_read = read_texts(chosen, tokenizer, Silent())
    read = texts_read.tokens
    assert {name: len(tokens) for name, tokens in read.items()} == dict.fromkeys(("pydoc", "stdlib"), 1000 + 32 - 1)
    assert not any((tokens == BOS).any() for tokens in read.values())
    teacher = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=258)))
    mixed = make_batches(chosen, texts_read, tokenizer, teacher, "teacher", Silent())
    assert (sampled["rows"], sampled["length"]) == (100, 8)
    assert all(tokens[0] == BOS for tokens in sampled["begin"])
    joined = ["".join(named_texts()[name].pieces("train")) for name in read]
    # A cut may split a character of several bytes.
    begun = [tokenizer.decode(tokens[1:]).strip("\ufffd") for tokens in sampled["begin"][1::2]]
    real = [any(text in whole for whole in joined) for text in begun]
    assert all(real)
    first = torch.cat([mixed[step] for step in range(10)])
    assert (first == 9).all(1).sum() == 20
    assert (first[(first != 9).any(1)][:, 0] == BOS).all()
    small = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=9)))
    with pytest.raises(TransmlaError, match="the model's vocabulary has 9 entries"):
        make_batches(chosen, texts_read, tokenizer, small, "teacher", Silent())


def test_minutes_alone_limit_a_healing_on_a_short_text() -> None:
    amounts = {"student": "s", "teacher": "t", "output": "o", "length": 128, "held_out": 4}
    with pytest.raises(TransmlaError, match=r"too few; its share is 10,000,000 tokens in at most 40 epochs, and 4 seq"):
        check_amount("pydoc", 73_009, 1.0, Healing(**amounts))
    check_amount("pydoc", 73_009, 1.0, Healing(**amounts, max_minutes=0.5))
    with pytest.raises(TransmlaError, match="too few"):
        check_amount("pydoc", 73_009, 1.0, Healing(**amounts, max_minutes=0.5, max_tokens=10_000_000))
    with pytest.raises(TransmlaError, match=r"8 too few; 4 sequences of 128 are held out; .*--length"):
        check_amount("pydoc", 760, 1.0, Healing(**amounts, max_minutes=0.5))


def test_fewer_tokens_are_advised_where_they_suffice() -> None:
    amounts = {"student": "s", "teacher": "t", "output": "o", "length": 128, "max_tokens": 100_000}
    with pytest.raises(TransmlaError, match=r"or lower --max-tokens$"):
        check_amount("pydoc", 10_000 - 10, 1.0, Healing(**amounts, max_epochs=1, held_out=4))
    check_amount("pydoc", 10_000 - 10, 1.0, Healing(**amounts | {"max_tokens": 128}, max_epochs=1, held_out=4))
    with pytest.raises(TransmlaError, match=r"or lower --held-out or --length$"):
        check_amount("pydoc", 10_000, 1.0, Healing(**amounts, held_out=99))
    check_amount("pydoc", 10_000, 1.0, Healing(**amounts | {"length": 32}, held_out=99))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"max_tokens": 10**8},
            r"text.txt' has 8,\d+ tokens, [\d,]+ too few; its share is 100,000,000 tok",
        ),
        ({"data": ("self",), "self_tokens": 100}, "'self' has 100 tokens, .* too few; .* raise --self-tokens"),
        ({"data": ("self:0.5", "pydoc"), "self_tokens": 200}, "'self' has 200 tokens, .* too few; its share is 1,536"),
        ({"data": ("nowhere.txt",)}, "no file nowhere.txt"),
        ({"split": "test"}, "has no split 'test'"),
    ],
    ids=str,
)
def test_texts_are_refused_before_a_model_is_loaded(
    change: dict[str, Any],
    says: str,
    make_healing: Callable[..., Healing],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    chosen = make_healing(**change)
    monkeypatch.setattr("transmla.heal.run.load_model", fail)
    monkeypatch.setattr("transmla.heal.run._teacher_fingerprint", fail)
    with pytest.raises(TransmlaError, match=says) as caught:
        heal(chosen)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("healed*"))


def test_processes_with_different_texts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_same_texts("one")
    monkeypatch.setattr("accelerate.utils.gather_object", lambda given: [*given, "two"])
    check_same_texts("two")
    with pytest.raises(TransmlaError, match="the processes have different texts"):
        check_same_texts("one")


@pytest.mark.parametrize(
    ("data", "says"),
    [(["a:0.5", "b:0.4"], "sum to 0.9"), (["a:0"], "must be above 0"), (["a", "a"], "given twice"), ([], "at least")],
)
def test_impossible_weights_are_refused(data: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        settings(data=data)
