"""Chat with a model in a terminal: streaming answers, and the size of the cache and the speed of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from transmla.boundary import boundary
from transmla.errors import TransmlaError
from transmla.modeling.sdpa import without_cudnn
from transmla.runtime.latent_cache import latent_bytes

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        max_new_tokens: largest number of tokens in an answer.
        temperature: 0 for greedy decoding.
        top_p: share of the probability that tokens are sampled from.
    """

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.95

    def options(self) -> dict[str, Any]:
        """Return the arguments of ``generate``."""
        limit: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0:
            return limit | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return limit | {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: the answer, without special tokens.
        prompt_tokens, new_tokens: numbers of tokens read and written.
        prefill_seconds: seconds until the first new token.
        decode_seconds: seconds for the other new tokens.
        cache_bytes: size of the cache after the answer.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed; None for an answer of one token."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds else None


class _Stream(TextStreamer):  # type: ignore[misc]
    """Streamer for ``generate``: passes text on word by word, counts tokens, and notes when the first one came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.text, self.count = "", 0
        self.first: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt [1, T], which comes first, or the next token [1]."""
        if not self.next_tokens_are_prompt:
            self.first = self.first or time.perf_counter()
            self.count += value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass ``text`` on."""
        self.text += text
        self.write(text)


def encode(tokenizer: Any, messages: list[Message]) -> torch.Tensor:
    """Return the token ids [1, T] of a conversation.

    The conversation goes through the chat template. Without a template, the ids are those of the last message alone,
    which the model continues.

    Raises:
        TransmlaError: if there are no tokens, if the template refuses the conversation, or if there is a message of the
            system and no template.
    """
    system = messages[0]["role"] == "system"
    if getattr(tokenizer, "chat_template", None):
        remedy = "leave --system out" if system else "correct the chat template in the model's folder"
        with boundary("the model's chat template refuses the conversation", remedy=remedy):
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
    elif system:
        raise TransmlaError(
            "--system has no effect here",
            limit="a model without a chat template continues the message alone",
            remedy="leave --system out",
        )
    else:
        ids = tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise TransmlaError(
            "the message is empty",
            limit="a model without a chat template continues the message, and needs a token to begin with",
            remedy="write a message",
        )
    return ids  # type: ignore[no-any-return]


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, messages: list[Message], sampling: Sampling, write: Callable[[str], object]
) -> Answer:
    """Answer the last of ``messages``.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        messages: the conversation, in transformers' form: dicts with ``role`` and ``content``.
        sampling: how to sample.
        write: is called with each piece of the answer's text.
    """
    ids = encode(tokenizer, messages).to(model.device)
    stream = _Stream(tokenizer, write)
    began = time.perf_counter()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with without_cudnn():
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=stream,
            pad_token_id=pad,
            return_dict_in_generate=True,
            **sampling.options(),
        )
    ended = time.perf_counter()
    first = stream.first or ended
    return Answer(
        stream.text,
        ids.shape[1],
        stream.count,
        first - began,
        ended - first,
        latent_bytes(generated.past_key_values),
    )


def converse(
    model: Any,
    tokenizer: Any,
    questions: Iterator[str],
    sampling: Sampling,
    write: Callable[[str], object],
    *,
    system: str | None = None,
) -> Iterator[Answer]:
    """Answer ``questions`` one after another, as one conversation; yield each answer when it is complete.

    Args:
        model, tokenizer, sampling, write: as for ``answer``.
        questions: the user's messages.
        system: a system message, which comes first.
    """
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question in questions:
        messages.append({"role": "user", "content": question})
        given = answer(model, tokenizer, messages, sampling, write)
        messages.append({"role": "assistant", "content": given.text})
        yield given
