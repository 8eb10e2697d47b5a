"""The tokenizer of a GGUF file, in llama.cpp's terms.

llama.cpp splits text into words with built-in rules, which a name in the file selects (``tokenizer.ggml.pre``). The
name is found here by the rules in the export's tokenizer. A tokenizer with other rules is refused: llama.cpp would
split text in another way than the model was trained with, without an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from transmla.errors import TransmlaError

# Types of tokens in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

# Parts of the regular expressions below.
_WORD, _ENDING = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_OTHER_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_LLAMA_3 = rf"{_ENDING}|{_WORD}|\p{{N}}{{1,3}}|{_OTHER}|{_SPACE}"
_DEEPSEEK_3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _SPACE
)
# Rules that split text into words: steps → name in llama.cpp. "bytes" is GPT-2's expression, "digits" single digits.
WORD_RULES: dict[tuple[str, ...], str] = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_LLAMA_3,): "llama-bpe",
    (rf"{_ENDING}|{_WORD}|\p{{N}}|{_OTHER}|{_SPACE}",): "qwen2",
    (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_OTHER_SLASH}|{_SPACE}",): "tekken",
    (rf"{_CASED[0]}{_ENDING}?|{_CASED[1]}{_ENDING}?|\p{{N}}{{1,3}}|{_OTHER_SLASH}|{_SPACE}",): "gpt-4o",
    (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK_3): "deepseek-v3",
}
# The same rules as "llama-bpe", for a vocabulary whose whole words also go through the merges.
LLAMA_3_MERGED = "smaug-bpe"
# Rules with which llama.cpp takes a word that is a token without its merges.
IGNORE_MERGES = ("llama-bpe", "tekken")


@dataclass(frozen=True)
class Vocabulary:
    """The fields of a GGUF file that describe a tokenizer.

    Attributes:
        model: ``gpt2`` for byte-level BPE, ``llama`` for SentencePiece's BPE.
        pre: name of the rules that split text into words.
        tokens: every token by id.
        types: the type of each token.
        merges: merges of byte-level BPE, as "left right"; empty for ``llama``.
        scores: score of each token of a ``llama`` vocabulary; empty for ``gpt2``.
        special: ids of special tokens, by GGUF's names: bos, eos, eot, unk and pad.
        add_bos: whether every text starts with BOS.
        add_eos: whether every text ends with EOS.
        space_prefix: whether a space is put before every text.
        template: chat template.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    template: str | None


def describe_tokenizer(tokenizer: Any, size: int, ends: list[int]) -> Vocabulary:
    """Describe a tokenizer of transformers in GGUF's terms.

    Args:
        tokenizer: the tokenizer.
        size: rows of the embedding; ids without a token become unused tokens.
        ends: ids that end a text, the model's EOS first.

    Raises:
        TransmlaError: if llama.cpp has no such tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal("it has no tokenizer.json")
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise _refusal(f"its model is {model['type']}, not BPE")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    by_bytes = bool(model.get("byte_fallback"))
    pre = _sentencepiece(rules) if by_bytes else _word_rules(rules)
    tokens, types = _tokens(tokenizer, size, by_bytes=by_bytes)
    return Vocabulary(
        model="llama" if by_bytes else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[] if by_bytes else merges,
        scores=_scores(tokens, merges) if by_bytes else [],
        special=_special(tokenizer, ends),
        add_bos=_adds(tokenizer, tokenizer.bos_token_id, first=True),
        add_eos=_adds(tokenizer, tokenizer.eos_token_id, first=False),
        space_prefix=by_bytes and "▁" in backend.encode("a", add_special_tokens=False).tokens[0],
        template=_template(tokenizer),
    )


def _word_rules(rules: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rules by which a byte-level BPE splits text into words."""
    normalizer = (rules["normalizer"] or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise _refusal(f"its normalizer is {normalizer}")
    pre = rules["pre_tokenizer"] or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    named = tuple(name for name in map(_step, steps) if name)
    name = WORD_RULES.get(named)
    if name is None:
        raise _refusal(f"its rules to split text into words are unknown: {named}")
    ignores = bool(rules["model"].get("ignore_merges"))
    if name == "llama-bpe" and not ignores:
        return LLAMA_3_MERGED
    if ignores != (name in IGNORE_MERGES):
        raise _refusal(f"its ignore_merges is {ignores}, which rules '{name}' of llama.cpp do not have")
    return name


def _step(step: dict[str, Any]) -> str:
    """Name one step of a pre-tokenizer: "bytes", "digits" or a regular expression; empty if it splits nothing."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes" if step.get("use_regex", True) else ""
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex", step["pattern"]))
    return json.dumps(step)


def _sentencepiece(rules: dict[str, Any]) -> str:
    """Return the name of SentencePiece's rules, which do not split text into words."""
    pre = rules["pre_tokenizer"] or {}
    if pre.get("type") not in (None, "Metaspace") or (pre and pre.get("split", True)):
        raise _refusal(f"its pre-tokenizer is {pre.get('type')}, beside byte tokens")
    normalizer = rules["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if other := [step["type"] for step in steps if step["type"] not in ("Prepend", "Replace")]:
        raise _refusal(f"its normalizer is {other[0]}")
    return "default"


def _tokens(tokenizer: Any, size: int, *, by_bytes: bool) -> tuple[list[str], list[int]]:
    """Return the text and the type of every id below ``size``."""
    vocabulary = tokenizer.get_vocab()
    if vocabulary and max(vocabulary.values()) >= size:
        raise _refusal(f"its largest id is {max(vocabulary.values()):,}, but the embedding has {size:,} rows")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, index in vocabulary.items():
        tokens[index] = token
        types[index] = BYTE if by_bytes and _BYTE.fullmatch(token) else NORMAL
    if by_bytes and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    for index, added in tokenizer.added_tokens_decoder.items():
        if types[index] == UNKNOWN:
            continue
        tokens[index] = str(added)
        types[index] = CONTROL if added.special else USER_DEFINED
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return a score for each token: llama.cpp makes the merge whose result has the highest score first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks[token] + 1) if token in ranks else 0.0 for token in tokens]


def _special(tokenizer: Any, ends: list[int]) -> dict[str, int]:
    """Return the ids of special tokens by GGUF's names."""
    ids = {"bos": tokenizer.bos_token_id, "eos": ends[0] if ends else tokenizer.eos_token_id}
    ids |= {"unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    # The end of a turn, where it is another token than the end of a text.
    ids["eot"] = next((index for index in (*ends, tokenizer.eos_token_id) if index not in (None, ids["eos"])), None)
    return {name: int(index) for name, index in ids.items() if index is not None}


def _adds(tokenizer: Any, token: int | None, *, first: bool) -> bool:
    """Return whether the tokenizer puts ``token`` at the beginning (or end) of every text."""
    return token is not None and tokenizer("a")["input_ids"][0 if first else -1] == token


def _template(tokenizer: Any) -> str | None:
    """Return the chat template; of several named ones, the default."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _refusal(limit: str) -> TransmlaError:
    return TransmlaError(
        "llama.cpp cannot read this tokenizer",
        limit=limit,
        remedy="use the export with transformers or vLLM",
    )
