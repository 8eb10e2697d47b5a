"""Text sources return the same tokens as tokenising the whole text, or raise an error of one line."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from helpers.byte_tokenizer import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transmla.errors import TransmlaError
from transmla.source import text as module
from transmla.source.self_text import sample_self
from transmla.source.text import SPREAD, load_blocks, load_excerpts, load_tokens
from transmla.source.texts import pydoc as data
from transmla.source.texts.rows import JSON_LOGGER

ROWS = ["first row", "second row", None, "third row"]
JOINED = "first row\n\nsecond row\n\nthird row"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds no BOS. Its declared context is 16 tokens, so every text exceeds it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([data.pydoc_text("test")[:30_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", model_max_length=16)


@pytest.fixture(scope="module")
def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer with BOS before and EOS after each text."""
    bpe = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(data.pydoc_text("train"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Iterator[LlamaForCausalLM]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
        )
        yield LlamaForCausalLM(config)


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_pydoc_splits_are_stable_and_share_no_paragraph() -> None:
    train, test = data.pydoc_text("train"), data.pydoc_text("test")
    assert (train, test) == (data.pydoc_text("train"), data.pydoc_text("test"))
    assert len(train) > len(test) > 40_000
    paragraphs = [{" ".join(p.split()) for p in part.split("\n\n")} for part in (train, test)]
    assert not paragraphs[0] & paragraphs[1]


def test_pydoc_default_split_is_train(tokenizer: PreTrainedTokenizerFast) -> None:
    default = load_blocks("pydoc", tokenizer, sequences=3, length=20)
    assert default.shape == (3, 20)
    assert default.dtype == torch.int64
    assert torch.equal(default, load_blocks("pydoc", tokenizer, sequences=3, length=20, split="train"))
    assert not torch.equal(default, load_blocks("pydoc", tokenizer, sequences=3, length=20, split="test"))


@pytest.mark.parametrize("limit", [1, 50, 3000, 20_000])
def test_prefix_of_a_file_equals_the_whole_file(
    limit: int, tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    expected = whole(tokenizer, text_file.read_text(encoding="utf-8"))
    assert load_tokens(str(text_file), tokenizer, limit=limit).tolist() == expected[:limit]
    assert load_tokens(str(text_file), tokenizer).tolist() == expected


@pytest.mark.parametrize(("sequences", "length"), [(1, 50), (7, 30), (40, 100)])
def test_blocks_are_spread_evenly(
    sequences: int, length: int, tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    known = whole(tokenizer, text_file.read_text(encoding="utf-8"))[: SPREAD * sequences * length]
    blocks = load_blocks(str(text_file), tokenizer, sequences=sequences, length=length)
    starts = [index * (len(known) - length) // max(1, sequences - 1) for index in range(sequences)]
    assert blocks.tolist() == [known[start : start + length] for start in starts]
    assert all(later - earlier >= length for earlier, later in itertools.pairwise(starts))


def test_a_text_just_long_enough_is_used_whole(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    expected = whole(tokenizer, text_file.read_text(encoding="utf-8"))
    length = len(expected) // 5
    blocks = load_blocks(str(text_file), tokenizer, sequences=5, length=length)
    assert blocks.numel() == 5 * length
    assert blocks[0].tolist() == expected[:length]
    assert blocks[-1].tolist() == expected[-length:]


def test_prefix_grows_when_tokens_are_long(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    # The pre-tokenizer splits at whitespace, so a token takes about 60 characters: five times CHARS_PER_TOKEN.
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1, "other": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "sparse.md"
    path.write_text("".join(("word" if i % 3 else "other") + " " * 60 + "\n" for i in range(2000)))
    sparse = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert load_tokens(str(path), sparse, limit=900).tolist() == [1 if i % 3 else 2 for i in range(900)]


def test_only_a_prefix_is_tokenised(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 0
    encode = PreTrainedTokenizerFast._encode_plus

    def spy(self: PreTrainedTokenizerFast, text: str | list[str], **options: object) -> object:
        nonlocal longest
        longest = max(longest, len("".join(text)))
        return encode(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", spy)
    load_tokens(str(text_file), tokenizer, limit=100)
    assert 100 < longest < 3000


def test_excerpts_are_spread_over_the_text_and_begin_with_lines(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Each of 20,000 lines holds its number, so an excerpt says where it comes from."""
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {i} of many\n" for i in range(20_000)), encoding="utf-8")
    rows = load_excerpts(str(path), tokenizer, count=16, length=24)
    assert rows.shape == (16, 24)
    texts = ["".join(tokenizer.convert_ids_to_tokens(row)).replace("Ġ", " ") for row in rows]
    numbers = [int(text.split()[1]) for text in texts]
    assert all(text.startswith(f"line {number} of") for text, number in zip(texts, numbers, strict=True))
    read = 5 * SPREAD * 16 * 24 // len("line 1000 of many\n")
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    assert numbers[0] < read / 16 < 1.2 * min(steps)
    assert max(steps) < 1.2 * read / 16


@pytest.mark.parametrize("words", [3, 40, 400])
def test_a_short_text_is_used_to_its_end(words: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("xy " * words, encoding="utf-8")
    rows, tokens = load_excerpts(str(path), tokenizer, count=16, length=24), whole(tokenizer, "xy " * words)
    if len(tokens) < 24:
        assert rows.tolist() == [tokens]
    else:
        step = max(1, len(tokens) // 24 // 16)
        assert rows.shape == (min(16, len(tokens) // 24), 24)
        assert rows.tolist() == [tokens[i * 24 * step :][:24] for i in range(len(rows))]
        assert len(tokens) - len(rows) * step * 24 < 16 * 24  # no more than the rest of a division is left out


def test_an_empty_text_gives_no_excerpts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.touch()
    with pytest.raises(TransmlaError, match="holds no text"):
        load_excerpts(str(path), tokenizer, count=1, length=2)


@pytest.mark.parametrize("space", [False, True], ids=["byte level", "a space before every text"])
def test_chunks_of_a_long_text_have_the_tokens_of_the_whole(
    space: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(
        f"def f{i}(x):\n    return x + {i}\n\n\n  # note {i}\nclass A{i}:\n\n    b = 1\n\n" for i in range(60)
    )
    tokenizer = byte_tokenizer([text], bos=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    whole = tokenizer(text)["input_ids"]
    monkeypatch.setattr(module, "CHUNK", 60)
    encode, counts = module._encode_all, list[int]()
    monkeypatch.setattr(module, "_encode_all", lambda texts, t: counts.append(len(texts)) or encode(texts, t))
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    assert load_tokens(str(file), tokenizer).tolist() == whole
    assert (counts[-1] == 1) == space


def test_two_chunks_have_the_tokens_of_the_whole_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one line of a text\n" * 5
    tokenizer = byte_tokenizer([text], bos=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    monkeypatch.setattr(module, "CHUNK", 60)
    assert len(module._chunks(text)) == 2
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert load_tokens(str(tmp_path / "text.txt"), tokenizer).tolist() == tokenizer(text)["input_ids"]


def test_one_bos_at_the_start_and_no_eos(with_bos: PreTrainedTokenizerFast, text_file: Path) -> None:
    expected = [0, *whole(with_bos, text_file.read_text(encoding="utf-8"))]
    assert load_tokens(str(text_file), with_bos, limit=500).tolist() == expected[:500]
    assert load_tokens(str(text_file), with_bos).tolist() == expected


def test_a_text_longer_than_the_context_gives_no_warning(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, caplog
) -> None:
    load_tokens(str(text_file), tokenizer, limit=500)
    assert "longer than" not in caplog.text


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("column", ["text", "body"])
def test_tables_join_their_rows(suffix: str, column: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    rows = [{"id": i, column: row} for i, row in enumerate(ROWS)]
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    chosen = None if column == "text" else column
    assert load_tokens(str(path), tokenizer, column=chosen).tolist() == whole(tokenizer, JOINED)
    with pytest.raises(TransmlaError, match=rf"has no column 'nope'; its columns: id, {column}"):
        load_tokens(str(path), tokenizer, column="nope")
    with pytest.raises(TransmlaError, match="has no text column 'id'"):
        load_tokens(str(path), tokenizer, column="id")


@pytest.mark.parametrize("name", ["part[1].jsonl", "[2024] runs/part.jsonl", "part*.jsonl", "part?.jsonl"])
def test_the_name_of_a_table_is_no_pattern(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.with_name("part2.jsonl").write_text('{"text": "of another file"}')
    path.write_text(json.dumps({"text": JOINED}))
    assert load_tokens(str(path), tokenizer).tolist() == whole(tokenizer, JOINED)


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("wikitext", {}, ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("wikitext", {"split": "test"}, ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("wikitext:wikitext-103-raw-v1", {}, ("Salesforce/wikitext", "wikitext-103-raw-v1", "train")),
        ("c4:de", {}, ("allenai/c4", "de", "train")),
        ("someone/text", {}, ("someone/text", None, "train")),
    ],
)
def test_hub_datasets_stream_only_what_is_needed(
    source: str,
    options: dict[str, str],
    expected: tuple[str, str | None, str],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal read
        for read in range(1, 100_000):
            yield {"text": f"row {read}"}

    def load_dataset(
        path: str, name: str | None, *, split: str, revision: str | None, streaming: bool
    ) -> Iterator[dict[str, str]]:
        assert streaming
        assert (path, name, split) == expected
        assert (revision is not None) == (path == "Salesforce/wikitext")
        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = "\n\n".join(f"row {i}" for i in range(1, 200))
    assert load_tokens(source, tokenizer, limit=40, **options).tolist() == whole(tokenizer, text)[:40]
    assert read < 1000


def test_an_unreachable_hub_is_an_error_of_one_line(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(TransmlaError, match=r"c4.*Hub could not be reached.*pydoc") as caught:
        load_tokens("c4", tokenizer, limit=10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "options", "message"),
    [
        ("missing.txt", None, {}, "no file"),
        ("table.xls", "a,b", {}, r"has an unknown file type; supported: \.txt, \.md, \.jsonl"),
        (
            "table.csv",
            "a,b\n1,2\n",
            {},
            r"has no column 'text'; its columns: a, b; name a .* --calibration-column",
        ),
        ("empty.txt", "", {}, "holds no text"),
        ("blank.md", " \n\n ", {}, "holds no text"),
        ("empty.jsonl", "", {}, "holds no text"),
        ("broken.jsonl", '{"text": "a"}\n{broken\n', {}, "cannot be read"),
        ("latin.txt", "caf\xe9".encode("latin-1"), {}, "not UTF-8"),
        (
            "short.txt",
            "one two three",
            {},
            r"has \d+ tokens, \d+ too few; 4 sequences of 8 tokens need 32; lower --cal",
        ),
        ("split.txt", "text", {"split": "test"}, "no split 'test'"),
        ("column.txt", "text", {"column": "body"}, "no column 'body'"),
        ("zero.txt", "text", {"sequences": 0}, "at least 1"),
    ],
)
def test_unusable_files_and_options_are_refused(
    file: str,
    content: str | bytes | None,
    options: dict[str, object],
    message: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TransmlaError, match=message):
        load_blocks(str(path), tokenizer, **{"sequences": 4, "length": 8, **options})


def test_self_and_unknown_pydoc_splits_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TransmlaError, match="only for calibration and healing; it is sampled"):
        load_tokens("self", tokenizer)
    with pytest.raises(TransmlaError, match="choose train or test"):
        load_tokens("pydoc", tokenizer, split="validation")


def test_samples_depend_only_on_the_seed_and_the_batch(model, tokenizer: PreTrainedTokenizerFast) -> None:
    done: list[tuple[int, int]] = []
    settings = copy.deepcopy(model.generation_config.to_dict())
    state = torch.random.get_rng_state()
    model.train()
    first = sample_self(model, tokenizer, sequences=5, length=24, batch_size=2, progress=lambda *p: done.append(p))
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.generation_config.to_dict() == settings
    assert done == [(2, 5), (4, 5), (5, 5)]
    assert first.shape == (5, 24)
    assert first.dtype == torch.int64
    assert (first[:, 0] == tokenizer.bos_token_id).all()
    torch.manual_seed(99)
    assert torch.equal(first, sample_self(model, tokenizer, sequences=5, length=24, batch_size=2))
    assert torch.equal(first[:2], sample_self(model, tokenizer, sequences=2, length=24, batch_size=2))
    assert not torch.equal(first, sample_self(model, tokenizer, sequences=5, length=24, batch_size=2, seed=1))
    assert first.unique(dim=0).shape[0] == 5


def test_samples_follow_the_models_distribution_and_continue_after_eos(
    model, tokenizer: PreTrainedTokenizerFast
) -> None:
    biased = copy.deepcopy(model).eval()
    # The checkpoint's generation settings must not change the samples.
    biased.generation_config.update(top_k=1, repetition_penalty=5.0)
    biased.lm_head = torch.nn.Linear(32, len(tokenizer))
    with torch.no_grad():
        biased.lm_head.weight.zero_()
        biased.lm_head.bias.fill_(-torch.inf)
        biased.lm_head.bias[[1, 7]] = torch.tensor([0.7, 0.3]).log()
    tokens = sample_self(biased, tokenizer, sequences=64, length=65, batch_size=64)[:, 1:]
    assert set(tokens.unique().tolist()) == {1, 7}
    assert (tokens == 1).double().mean().item() == pytest.approx(0.7, abs=0.03)


def test_samples_from_the_cache_equal_the_full_forward(model, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = sample_self(model, tokenizer, sequences=3, length=12, batch_size=3)
    replayed = tokens[:, :1]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        while replayed.shape[1] < 12:
            probabilities = model(replayed, use_cache=False).logits[:, -1].softmax(-1)
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            replayed = torch.cat([replayed, drawn], dim=1)
    assert torch.equal(tokens, replayed)


def test_samples_start_from_eos_without_a_bos(model) -> None:
    unigrams = Tokenizer(models.WordLevel({"</s>": 3}, unk_token="</s>"))
    headless = copy.deepcopy(model)
    headless.config.bos_token_id = None
    ending = PreTrainedTokenizerFast(tokenizer_object=unigrams, eos_token="</s>")
    assert sample_self(headless, ending, sequences=2, length=1).tolist() == [[3], [3]]
    with pytest.raises(TransmlaError, match="no BOS, EOS or padding"):
        sample_self(headless, PreTrainedTokenizerFast(tokenizer_object=unigrams), sequences=1, length=2)


def test_a_broken_table_is_one_line(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{broken\n')
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(JSON_LOGGER)
    level = logger.level
    logger.addHandler(handler)
    with pytest.raises(TransmlaError, match="cannot be read"):
        load_tokens(str(tmp_path / "broken.jsonl"), tokenizer)
    logger.removeHandler(handler)
    assert (said, logger.level) == ([], level)
