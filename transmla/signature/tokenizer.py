"""Describe what a tokenizer does, in a few comparable values."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# Text of several scripts, with code, numbers, spaces, accents, emoji and signs of chat templates.
SAMPLE = """The 3 quick brown foxes (1,234.56 kg)   jumped over   "lazy" dogs; don't they? ÄÖÜß façade naïve œuvre ½ ²
Съешь же ещё этих мягких французских булок 我能吞下玻璃而不伤身体。いろはにほへと 한국어 שלום مرحبا नमस्ते 🙂👩‍🚀
\tdef f(x: list[int]) -> None:\r\n        return {'a': x[0] ** 2 + 1e-5}  # <|im_start|>user [INST] <s> </s> é ﬁ"""
# Tokens of the vocabulary whose text is tokenised again, at most; they spread over all of it.
SAMPLED_TOKENS = 4096
SETTINGS = ("model_max_length", "padding_side", "truncation_side")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Return what ``tokenizer`` does: hashes of its vocabulary, templates and results, and its settings."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    encoded = tokenizer(SAMPLE)["input_ids"]
    plain = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    chosen = vocabulary[:: max(1, len(vocabulary) // SAMPLED_TOKENS)]
    texts = [_text(tokenizer, [index]) for index, _ in chosen]
    special = [str(getattr(tokenizer, name, None)) for name in SPECIAL]
    # A special token that is not in the vocabulary has no id.
    ids = sorted(index for index in tokenizer.all_special_ids if index is not None)
    return {
        "vocabulary": _hash(vocabulary),
        "special tokens": _hash([special, ids]),
        "templates": _hash(getattr(tokenizer, "chat_template", None)),
        "tokens of a sample": _hash([encoded, plain]),
        "tokens of the vocabulary": _hash(tokenizer(texts, add_special_tokens=False)["input_ids"]),
        "text of a sample": _hash(_text(tokenizer, encoded)),
        "settings": _hash([getattr(tokenizer, name, None) for name in SETTINGS]),
    }


def _text(tokenizer: Any, ids: list[int]) -> str:
    # Versions of transformers have other defaults for cleaning up spaces.
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
