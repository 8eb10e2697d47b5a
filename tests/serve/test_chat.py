"""`transmla chat`: answers stream word by word, a conversation is remembered, and the cache is counted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import Run

import transmla
from transmla.errors import TransmlaError
from transmla.serve.chat import Answer, Sampling, answer, converse, encode
from transmla.source.load import load_tokenizer

GREEDY = Sampling(max_new_tokens=6, temperature=0)
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


@pytest.fixture
def opened(pair: tuple[Path, Path]) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(pair[1])
    tokenizer.chat_template = TEMPLATE
    return transmla.load(pair[1]), tokenizer


def test_an_answer_is_what_generate_returns(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    messages = [{"role": "user", "content": "the cat sat on the mat"}]
    pieces: list[str] = []
    given = answer(model, tokenizer, messages, GREEDY, pieces.append)
    ids = encode(tokenizer, messages)
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert given.text == "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert given.prompt_tokens == ids.shape[1]
    assert given.new_tokens == len(tokens)
    rows = given.prompt_tokens + given.new_tokens - 1
    config = model.config
    values = config.kv_lora_rank + config.qk_rope_head_dim
    assert given.cache_bytes == rows * config.num_hidden_layers * values * model.dtype.itemsize


def test_a_conversation_is_remembered(opened: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[dict[str, str]]] = []

    def listen(model: Any, tokenizer: Any, messages: list[dict[str, str]], *rest: Any) -> Answer:
        seen.append([dict(message) for message in messages])
        return Answer(f"answer {len(seen)}", 1, 2, 0.1, 0.5, 10)

    monkeypatch.setattr("transmla.serve.chat.answer", listen)
    given = list(converse(*opened, iter(["one", "two"]), GREEDY, print, system="short"))
    assert [message["content"] for message in seen[1]] == ["short", "one", "answer 1", "two"]
    assert [message["role"] for message in seen[1]] == ["system", "user", "assistant", "user"]
    assert given[0].tokens_per_second == 2.0


def test_a_message_without_tokens_is_refused() -> None:
    def tokenizer(text: str, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(1, len(text))}

    assert encode(tokenizer, [{"role": "user", "content": "a"}]).shape == (1, 1)
    with pytest.raises(TransmlaError, match="the message is empty"):
        encode(tokenizer, [{"role": "user", "content": ""}])


def test_without_a_template_the_model_continues(pair: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer(pair[1])
    tokenizer.chat_template = None
    messages = [{"role": "user", "content": "a b"}, {"role": "user", "content": "the cat"}]
    assert torch.equal(encode(tokenizer, messages), tokenizer("the cat", return_tensors="pt")["input_ids"])


@pytest.mark.parametrize(
    ("template", "system", "says"),
    [
        (
            "{{ raise_exception('System role not supported') }}",
            True,
            "refuses .*; .*System role .*; leave --system out",
        ),
        ("{{ messages | nothing }}", False, "refuses .*; .*No filter named 'nothing'.*; correct the chat template"),
        (None, True, "--system has no effect here; .* without a chat template .*; leave --system out"),
    ],
)
def test_what_a_template_cannot_take_is_refused(
    pair: tuple[Path, Path], template: str | None, system: bool, says: str
) -> None:
    tokenizer = load_tokenizer(pair[1])
    tokenizer.chat_template = template
    first = [{"role": "system", "content": "short"}] if system else []
    with pytest.raises(TransmlaError, match=says):
        encode(tokenizer, [*first, {"role": "user", "content": "the cat"}])


@pytest.mark.parametrize("name", ["out", "source"])
def test_the_command_prints_speed_and_cache(
    run: Run, converted: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat sat"))
    code, out, _ = run("chat", str(converted / name), "--max-new-tokens", "5", "--temperature", "0")
    assert code == 0
    line = out.splitlines()[-1]
    assert line.startswith("[")
    assert "tokens/s" in line
    assert ("the source's would be" in line) == (name == "out")


def test_a_message_and_a_backend_are_options(run: Run, converted: Path) -> None:
    given = ("--prompt", "the cat", "--max-new-tokens", "3", "--backend")
    assert run("chat", str(converted / "out"), *given, "torch")[0] == 0
    code, _, error = run("chat", str(converted / "out"), *given, "nothing")
    assert code == 2
    assert "nothing" in error


@pytest.mark.parametrize(
    ("argv", "temperature"),
    [
        (["--prompt", "the cat"], 0),
        (["--prompt", "the cat", "--temperature", "0.5"], 0.5),
        (["--prompt", "the cat", "--top-p", "0.9"], 0.7),
        ([], 0),  # standard input is one message
    ],
)
def test_one_message_is_answered_greedily(
    run: Run, converted: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], temperature: float
) -> None:
    used: list[Sampling] = []

    def answer(model: Any, tokenizer: Any, messages: Any, sampling: Sampling, write: Any) -> Answer:
        used.append(sampling)
        return Answer("", 1, 2, 0.1, 0.5, 10)

    monkeypatch.setattr("transmla.serve.chat.answer", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat"))
    assert run("chat", str(converted / "out"), *argv)[0] == 0
    assert used[0].temperature == temperature


def test_a_chat_samples(run: Run, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Sampling] = []

    def answer(model: Any, tokenizer: Any, messages: Any, sampling: Sampling, write: Any) -> Answer:
        used.append(sampling)
        return Answer("", 1, 2, 0.1, 0.5, 10)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("transmla.serve.chat.answer", answer)
    monkeypatch.setattr("sys.stdin", Terminal("the cat\n"))
    assert run("chat", str(converted / "out"))[0] == 0
    assert (used[0].temperature, used[0].top_p) == (0.7, 0.95)


@pytest.mark.parametrize(("words", "beyond"), [(1, False), (600, True)])
def test_a_conversation_beyond_the_context_gets_a_note(run: Run, converted: Path, words: int, beyond: bool) -> None:
    given = ("--prompt", "the cat " * words, "--max-new-tokens", "3")
    code, _, error = run("chat", str(converted / "out"), *given)
    assert code == 0
    assert ("tokens, and the model reads up to 256: answers beyond that are poor; start a new chat" in error) == beyond
