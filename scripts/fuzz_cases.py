"""Damaged inputs for ``fuzz.py``: which file is changed, how, and which command reads it.

A case is a dict that JSON can hold: the ``input`` it belongs to, the ``base`` folder that is copied, the ``verb``, and
a list of ``edits``. An edit is ``["set", file, path, value]``, ``["delete", file, path]``, ``["file", file, hex]`` or
``["bytes", file, offset, hex]``. ``path`` lists the keys that lead to a value inside the JSON of ``file``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

Case = dict[str, Any]

# Numbers, texts and values of other types that readers of a config, an index or a recipe do not expect.
NUMBERS = [0, 1, -1, 2, 3, 7, 10**3, 10**6, 10**9, 2**31, 2**63, 10**20, 10**400, 0.0, -1.0, 0.5, 1e-30, 1e30, 1e308]
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    "x",
    "auto",
    "None",
    "../x",
    "/etc/hostname",
    "a" * 5000,
    "\x1b[31mred\x07",
    "\ud800",
    "é",
    "a\x00b",
    "{0}",
]
TEXTS += [
    "silu",
    "default",
    "yarn",
    "longrope",
    "sliding_attention",
    "float32",
    "float16",
    "llama",
    "gemma2",
    "bitsandbytes",
]
OTHERS = [None, True, False, [], {}, [1], ["x"], [None, 5], {"a": 1}, {"x": {"y": []}}, [[[]]], [10**9, 2], {"type": 5}]
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(NOT_FINITE),
    st.sampled_from(TEXTS),
    st.sampled_from(OTHERS),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=12),
)
# Whole files that are no file of the expected kind.
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
FILES = [b"", b"null", b"5", b"[]", b"{}", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe\xfa", b"\x00" * 64]
FILES += [b"<html>not found</html>", b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', b"1" * 6000, POINTER, b"NaN", b"{]"]

# Keys that a config may have besides those in the base's file.
CONFIG_KEYS = [
    "text_config", "quantization_config", "auto_map", "sliding_window", "layer_types", "rope_scaling",
    "rope_parameters", "attention_bias", "num_experts", "num_local_experts", "pad_token_id",
    "partial_rotary_factor", "torch_dtype", "dtype", "original_max_position_embeddings", "architectures",
    "attn_logit_softcapping", "query_pre_attn_scalar", "head_dim", "attn_implementation",
    "_attn_implementation", "transformers_version", "num_key_value_heads", "is_decoder", "no_rope_layers",
    "mlp_only_layers", "decoder_sparse_step", "max_window_layers", "use_sliding_window", "id2label",
    "num_labels", "problem_type", "pruned_heads", "tie_word_embeddings", "output_attentions", "return_dict",
]  # fmt: skip
TOKENIZER_KEYS = [
    "tokenizer_class", "auto_map", "added_tokens_decoder", "chat_template", "model_max_length", "bos_token",
    "eos_token", "additional_special_tokens", "add_bos_token", "padding_side", "truncation", "padding",
    "normalizer", "post_processor", "extra_special_tokens", "legacy", "use_fast", "tokenizer_file",
    "vocab_file", "name_or_path", "clean_up_tokenization",
]  # fmt: skip
RECIPE_KEYS = [
    "source", "output", "revision", "allow_pickle", "cache_ratio", "kv_lora_rank", "qk_rope_head_dim",
    "qk_nope_head_dim", "v_head_dim", "q_lora_rank", "pad_for", "custom_rope", "allow_no_saving", "format",
    "layers", "method", "reconstruct", "heal", "freqfold", "dtype", "seed", "device", "calibration", "eval",
    "colour",
]  # fmt: skip
# Scalars of YAML that PyYAML reads in a special way, or fails to.
SCALARS = [
    "2001-99-99", "2001-12-14t21:59:43.10-95:00", "!!timestamp x", "!!int ''", "!!float x", "!!bool x", "0x_",
    "9" * 5000, "[" * 3000, "!!python/object/apply:os.system [id]", "!!python/name:os.system", "&a [*a]", "*b",
    "{1: 2}", "? x", "<<: 5", "0o9", "1:2:99", ".inf", ".nan", "~", "!!binary =", "!!set {a}", "!!omap [a]",
    "!!pairs [a]", "'", "|", "%", "@", "`", "- a\n- b", "\t", "!x", "null: 3", "0b", "190:20:30", "!!null x",
    "!!seq x", "!!map x", "'\\x1b'", '"\\x1b[2J"', "[a:", "{",
]  # fmt: skip


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[list[Any]]:
    """Return the paths of all values inside ``value``, at most 40 of a list or dict."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())[:40]
    elif isinstance(value, list):
        items = list(enumerate(value[:40]))
    found = [[*prefix, key] for key, _ in items]
    for key, inner in items:
        found += paths(inner, (*prefix, key))
    return found


def changes(file: str, document: Any, keys: list[str], *, whole: int = 6) -> st.SearchStrategy[list[list[Any]]]:
    """Return a strategy of edits of one JSON file: one to three of its values, or one time in ``whole`` all bytes.

    If ``whole`` is 0, only values are edited.
    """
    present = st.sampled_from(paths(document) or [["x"]])
    added = st.sampled_from([[key] for key in keys] or [["x"]])
    place = st.one_of(present, present, present, added)
    one = st.one_of(
        st.tuples(st.just("set"), st.just(file), place, VALUES),
        st.tuples(st.just("set"), st.just(file), place, VALUES),
        st.tuples(st.just("delete"), st.just(file), present),
    ).map(list)
    replaced = st.sampled_from(FILES).map(lambda data: [["file", file, data.hex()]])
    values = st.lists(one, min_size=1, max_size=3)
    return st.integers(1, whole).flatmap(lambda i: replaced if i == 1 else values) if whole else values


def byte_changes(file: str, size: int) -> st.SearchStrategy[list[list[Any]]]:
    """Return a strategy of edits that overwrite a few of the first ``size`` bytes of a file."""
    one = st.tuples(
        st.just("bytes"),
        st.just(file),
        st.integers(0, max(0, size - 1)),
        st.binary(min_size=1, max_size=8).map(bytes.hex),
    )
    replaced = st.sampled_from(FILES).map(lambda data: [["file", file, data.hex()]])
    several = st.lists(one.map(list), min_size=1, max_size=3)
    return st.integers(1, 12).flatmap(lambda i: replaced if i == 1 else several)


def verbs(weights: dict[str, int]) -> st.SearchStrategy[str]:
    """Return a strategy of verbs, each as often as its weight says."""
    return st.sampled_from([verb for verb, weight in weights.items() for _ in range(weight)])


def cases(name: str, base: str, verb: st.SearchStrategy[str], edits: Any) -> st.SearchStrategy[Case]:
    """Return a strategy of cases of one input and base."""
    return st.builds(lambda v, e: {"input": name, "base": base, "verb": v, "edits": e}, verb, edits)


def apply(folder: Path, edits: list[list[Any]]) -> None:
    """Change the files of ``folder`` in place. An edit whose path no longer exists does nothing."""
    for kind, name, *rest in edits:
        file = folder / name
        if kind == "file":
            _replace(file, bytes.fromhex(rest[0]))
        elif kind == "bytes":
            data, new = bytearray(file.read_bytes()), bytes.fromhex(rest[1])
            data[rest[0] : rest[0] + len(new)] = new
            _replace(file, bytes(data))
        else:
            _edit_document(file, kind, *rest)


def _edit_document(file: Path, kind: str, path: list[Any], value: Any = None) -> None:
    """Set or delete one value of a JSON or YAML file, or of the header of a safetensors file."""
    data, tail = (file.read_bytes() if file.exists() else b"{}"), b""
    try:
        if file.suffix == ".safetensors":
            size = int.from_bytes(data[:8], "little")
            data, tail = data[8 : 8 + size], data[8 + size :]
        document = yaml.safe_load(data) if file.suffix == ".yaml" else json.loads(data)
        place = document
        for key in path[:-1]:
            place = place[key]
        if kind == "set":
            place[path[-1]] = value
        else:
            del place[path[-1]]
    except (KeyError, IndexError, TypeError, ValueError, RecursionError):
        return
    new = yaml.safe_dump(document).encode() if file.suffix == ".yaml" else json.dumps(document).encode()
    _replace(file, len(new).to_bytes(8, "little") + new + tail if file.suffix == ".safetensors" else new)


def _replace(file: Path, data: bytes) -> None:
    # A new file: the folder's files are hard links to those of the base.
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def _document(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _sources(root: Path, light: bool = False) -> st.SearchStrategy[Case]:
    read = verbs({"plan": 6, "convert": 3, "eval": 1, "inspect": 1, "bench": 1, "teacher": 1})
    each = [
        cases("config", base, read, changes("config.json", _document(root / base / "config.json"), CONFIG_KEYS))
        for base in ("llama", "qwen3", "gemma3_text", "phi3", "gpt_oss")
    ]
    if light:
        return st.one_of(each)
    loaded = verbs({"eval": 2, "bench": 1, "load": 2})
    each += [
        cases("config", base, loaded, changes("config.json", _document(root / base / "config.json"), CONFIG_KEYS))
        for base in ("native", "own")
    ]
    return st.one_of(each)


def _indices(root: Path) -> st.SearchStrategy[Case]:
    file = "model.safetensors.index.json"
    read = verbs({"plan": 5, "convert": 1, "eval": 2, "teacher": 1})
    return cases(
        "index", "sharded", read, changes(file, _document(root / "sharded" / file), ["weight_map", "metadata"])
    )


def _headers(root: Path) -> st.SearchStrategy[Case]:
    file = "model.safetensors"
    data = (root / "llama" / file).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    read = verbs({"plan": 4, "convert": 2, "eval": 1})
    by_value = changes(file, header, ["__metadata__", "model.norm.weight", "x"])
    return st.one_of(
        cases("headers", "llama", read, by_value), cases("headers", "llama", read, byte_changes(file, 8 + size))
    )


def _recipes(root: Path) -> st.SearchStrategy[Case]:
    file = "recipe.yaml"
    read = verbs({"recipe-plan": 4, "recipe-convert": 1})
    keys = [*RECIPE_KEYS]
    by_value = changes(file, yaml.safe_load((root / "llama" / file).read_text()), keys)
    text = (root / "llama" / file).read_bytes()
    line = st.tuples(st.sampled_from(keys), st.sampled_from(SCALARS)).map(
        lambda pair: [["file", file, (text + f"{pair[0]}: {pair[1]}\n".encode()).hex()]]
    )
    return st.one_of(
        cases("recipes", "llama", read, by_value),
        cases("recipes", "llama", read, line),
        cases("recipes", "llama", read, byte_changes(file, len(text))),
    )


def _manifests(root: Path) -> st.SearchStrategy[Case]:
    read = verbs({"verify": 2, "push": 2, "card": 4, "heal": 1})
    files = {"transmla.json": 6, "verification.json": 1, "recipe.yaml": 1}
    each = []
    for base in ("native", "own", "healed"):
        for file, weight in files.items():
            path = root / base / file
            document = yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else _document(path)
            each += [cases("manifests", base, read, changes(file, document, ["plan", "hashes", "healing"]))] * weight
    return st.one_of(each)


def _ggufs(root: Path) -> st.SearchStrategy[Case]:
    fields = _document(root / "gguf" / "fields.json")
    read = verbs({"gguf-plan": 3, "gguf-eval": 1})
    by_value = changes("fields.json", fields, ["llama.rope.scaling.type", "general.alignment", "split.count"], whole=0)
    header = (root / "gguf" / "model.gguf").stat().st_size // 3
    return st.one_of(
        cases("gguf", "gguf", read, by_value), cases("gguf", "gguf", read, byte_changes("model.gguf", header))
    )


def _tokenizers(root: Path) -> st.SearchStrategy[Case]:
    read = verbs({"convert": 3, "eval": 2, "inspect": 1, "chat": 1})
    each = []
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        document = _document(root / "llama" / file)
        each += [cases("tokenizers", "llama", read, changes(file, document, TOKENIZER_KEYS))] * 2
    raw = st.sampled_from(
        [*FILES, b"{{ 1/0 }}", b"{% for i in range(10**9) %}x{% endfor %}", b"{% if %}", b"{{ messages }}"]
    )
    template = raw.map(lambda data: [["file", "chat_template.jinja", data.hex()]])
    maps = changes("special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}}, TOKENIZER_KEYS)
    each += [cases("tokenizers", "llama", read, template), cases("tokenizers", "llama", read, maps)]
    return st.one_of(each)


# Input → (share of all cases, strategy of its cases from the folder of the bases).
INPUTS: dict[str, tuple[float, Callable[..., st.SearchStrategy[Case]]]] = {
    "config": (0.27, _sources),
    "index": (0.1, _indices),
    "headers": (0.15, _headers),
    "recipes": (0.15, _recipes),
    "manifests": (0.13, _manifests),
    "gguf": (0.1, _ggufs),
    "tokenizers": (0.1, _tokenizers),
}
