"""Samples continue openings, are drawn without repetitive rows, and are cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.byte_tokenizer import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transmla.reporter import Silent
from transmla.source import samples
from transmla.source.samples import sampled_rows
from transmla.source.self_text import DISTINCT, GRAM, sample_self, without_repetition

# Every test draws its own samples.
pytestmark = pytest.mark.usefixtures("assets")

OPENINGS = [[0, 65, 66], [0, 70], [0, *range(40, 50)], [0, 80, 81, 82, 83]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
        )
        return LlamaForCausalLM(config).eval()


def drawn(model: Any, tokenizer: Any, **changes: Any) -> torch.Tensor:
    """Return samples by ``sampled_rows``, with short settings."""
    settings = {"openings": OPENINGS, "rows": 5, "length": 16, "seed": 0, "fingerprint": "weights", **changes}
    return sampled_rows(model, tokenizer, settings.pop("openings"), **settings, report=Silent())


def test_openings_stay_at_the_start_of_their_rows(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = sample_self(model, tokenizer, sequences=10, length=24, batch_size=4, openings=OPENINGS)
    for i, row in enumerate(rows.tolist()):
        opening = OPENINGS[i % len(OPENINGS)]
        assert row[: len(opening)] == opening
    assert rows.unique(dim=0).shape[0] == 10


def test_an_opening_is_cut_to_half_the_row(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    long = [[0, *range(100, 140)]]
    rows = sample_self(model, tokenizer, sequences=2, length=20, openings=long)
    assert (rows[:, :10] == torch.tensor(long[0][:10])).all()
    assert not torch.equal(rows[0, 10:], torch.tensor(long[0][10:20]))
    assert sample_self(model, tokenizer, sequences=1, length=1, openings=long).tolist() == [[0]]


def test_openings_of_different_lengths_equal_the_full_forward(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Every position draws one token per row; a row that is still in its opening keeps the opening's token."""
    rows = sample_self(model, tokenizer, sequences=4, length=24, batch_size=4, openings=OPENINGS)
    replayed = torch.tensor([opening[:2] for opening in OPENINGS])
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        while (position := replayed.shape[1]) < 24:
            probabilities = model(replayed, use_cache=False).logits[:, -1].softmax(-1)
            column = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
            for row, opening in enumerate(OPENINGS):
                if position < len(opening):
                    column[row] = opening[position]
            replayed = torch.cat([replayed, column[:, None]], 1)
    assert torch.equal(rows, replayed)


@pytest.mark.parametrize("opening", OPENINGS, ids=len)
def test_a_row_sampled_alone_continues_its_opening(
    opening: list[int], model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A batch of equal openings draws its first row as a batch of mixed openings does: the generator is the same."""
    alone = sample_self(model, tokenizer, sequences=1, length=24, batch_size=1, openings=[opening])
    replayed = torch.tensor([opening])
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        while replayed.shape[1] < 24:
            probabilities = model(replayed, use_cache=False).logits[:, -1].softmax(-1)
            replayed = torch.cat([replayed, torch.multinomial(probabilities, 1, generator=generator)], 1)
    assert torch.equal(alone, replayed)


def test_kernels_that_plan_every_length_draw_no_samples(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[bool] = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    sample_self(model, tokenizer, sequences=1, length=8)
    handle.remove()
    assert seen == [False] * 7
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_repetitive_rows_are_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    good = torch.randint(0, 200, (4, 40), generator=generator)
    constant = torch.full((1, 40), 7)
    loop = torch.arange(3).repeat(14)[None, :40]
    rows = torch.cat([constant, good[:2], loop, good[2:]])
    assert torch.equal(without_repetition(rows, 4), good)
    # If there are too few good rows, the least repetitive of the others are taken, and the order is kept.
    assert torch.equal(without_repetition(rows, 5), torch.cat([good[:2], loop, good[2:]]))
    assert torch.equal(without_repetition(rows, 6), rows)
    half = torch.cat([good[0, :22], good[0, :1].expand(18)])[None]  # just more than DISTINCT of its runs differ
    assert len(torch.unique(half[0].unfold(0, GRAM, 1), dim=0)) > DISTINCT * (40 - GRAM + 1)
    assert torch.equal(without_repetition(torch.cat([half, good]), 4), torch.cat([half, good[:3]]))
    assert torch.equal(without_repetition(constant[:, :GRAM], 1), constant[:, :GRAM])


def test_a_model_that_repeats_itself_is_sampled_more_often(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(*_: Any, sequences: int, length: int, **__: Any) -> torch.Tensor:
        rows = torch.randint(0, 200, (sequences, length), generator=torch.Generator().manual_seed(1))
        rows[3] = 7
        asked.append(sequences)
        return rows

    asked: list[int] = []
    monkeypatch.setattr(samples, "sample_self", sample)
    rows = drawn(model, tokenizer, rows=20)
    assert asked == [22]
    assert rows.shape == (20, 16)
    assert not (rows == 7).all(1).any()


@pytest.mark.parametrize(("length", "pieces"), [(8, 1), (16, 2), (20, 3), (5, 1)])
def test_long_rows_are_joined_from_several_samples(
    length: int,
    pieces: int,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(samples, "SAMPLE_LENGTH", 8)
    rows = drawn(model, tokenizer, length=length, rows=6)
    assert rows.shape == (6, length)
    starts = rows[:, ::8]
    assert starts.shape[1] == pieces
    assert (starts == tokenizer.bos_token_id).all()


def test_samples_are_drawn_once(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = drawn(model, tokenizer)
    others = [{"seed": 1}, {"fingerprint": "others"}, {"rows": 4}, {"length": 12}, {"openings": OPENINGS[:3]}]
    different = [drawn(model, tokenizer, **change) for change in others]
    assert len(list(assets.rglob("*.safetensors"))) == 6
    monkeypatch.setattr(samples, "sample_self", None)
    assert torch.equal(drawn(model, tokenizer), first)
    for change, rows in zip(others, different, strict=True):
        assert torch.equal(drawn(model, tokenizer, **change), rows)
    assert not torch.equal(different[0], first)


@pytest.mark.parametrize("error", [PermissionError, ValueError])
def test_a_cache_that_cannot_be_written_is_not_needed(
    error: type[Exception],
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    assets: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = drawn(model, tokenizer)

    def refuse(*_: Any, **__: Any) -> None:
        raise error("no cache")

    monkeypatch.setattr("huggingface_hub.cached_assets_path", refuse)
    assert torch.equal(drawn(model, tokenizer), expected)


def test_openings_outside_the_models_vocabulary_are_left_out(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    beyond = [[0, 258], *OPENINGS, [0, 1, 9999]]
    assert torch.equal(drawn(model, tokenizer, openings=beyond), drawn(model, tokenizer))
    assert (drawn(model, tokenizer, openings=[[0, 258]])[:, 0] == tokenizer.bos_token_id).all()
