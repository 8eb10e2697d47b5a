"""Tokenizers in llama.cpp's terms: known rules get their name, unknown ones are refused."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from transmla.errors import TransmlaError
from transmla.serve.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, describe_tokenizer

# The expressions as the tokenizers of these models have them.
QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = QWEN_2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES, PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False), {"add_prefix_space": False, "use_regex": False}


def split(*expressions: str) -> Any:
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(**PLAIN)])


def wrap(backend: Tokenizer, **names: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **names)


def by_bytes(pre: Any, normalizer: Any = None, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the tokens a, b, ab, and three added ones."""
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}
    backend = Tokenizer(models.BPE(words, [("a", "b")], **options))
    backend.pre_tokenizer = pre
    if normalizer:
        backend.normalizer = normalizer
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return wrap(backend)


def llama_2() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama-2's: SentencePiece's BPE with byte tokens."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x41>": 3, "▁": 4, "a": 5, "b": 6, "ab": 7, "▁ab": 8}
    merges = [("a", "b"), ("▁", "ab")]
    backend = Tokenizer(models.BPE(words, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.ByteFallback()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(backend, unk_token="<unk>")


@pytest.mark.parametrize(
    ("pre", "options", "name"),
    [
        (BYTES, {}, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), {}, "smollm"),
        (split(QWEN_2), {}, "qwen2"),
        (split(LLAMA_3), {"ignore_merges": True}, "llama-bpe"),
        (split(LLAMA_3), {}, "smaug-bpe"),
        (split(TEKKEN), {"ignore_merges": True}, "tekken"),
    ],
)
def test_known_rules_get_their_name(pre: Any, options: dict[str, Any], name: str) -> None:
    assert describe_tokenizer(by_bytes(pre, **options), 6, []).pre == name


def test_a_byte_level_vocabulary() -> None:
    found = describe_tokenizer(by_bytes(BYTES), 8, [1, 4])
    assert found.model == "gpt2"
    assert found.tokens == ["<s>", "</s>", "a", "b", "ab", "<tool>", "[PAD6]", "[PAD7]"]
    assert found.types == [CONTROL, CONTROL, NORMAL, NORMAL, NORMAL, USER_DEFINED, UNUSED, UNUSED]
    assert (found.merges, found.scores) == (["a b"], [])
    assert found.special == {"bos": 0, "eos": 1, "eot": 4}
    assert (found.add_bos, found.add_eos) == (False, False)


def test_a_sentencepiece_vocabulary() -> None:
    found = describe_tokenizer(llama_2(), 9, [2])
    assert (found.model, found.pre, found.merges) == ("llama", "default", [])
    assert found.types == [UNKNOWN, CONTROL, CONTROL, BYTE, *[NORMAL] * 5]
    # The first merge has the highest score.
    assert found.scores[7] > found.scores[8]
    assert (found.add_bos, found.add_eos, found.space_prefix) == (True, False, True)


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (by_bytes(split(r"\p{L}+")), "unknown"),
        (by_bytes(pre_tokenizers.Whitespace()), "unknown"),
        (by_bytes(BYTES, normalizers.Lowercase()), "normalizer is Lowercase"),
        (by_bytes(split(TEKKEN)), "ignore_merges is False"),
        (wrap(Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))), "WordLevel"),
    ],
)
def test_unknown_tokenizers_are_refused(tokenizer: PreTrainedTokenizerFast, says: str) -> None:
    with pytest.raises(TransmlaError, match=says):
        describe_tokenizer(tokenizer, 8, [])


def test_a_vocabulary_larger_than_the_embedding_is_refused() -> None:
    with pytest.raises(TransmlaError, match="the embedding has 3 rows"):
        describe_tokenizer(by_bytes(BYTES), 3, [])
