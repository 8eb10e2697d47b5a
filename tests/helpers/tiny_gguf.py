"""Write a tiny GGUF file, whose fields lie beside it as JSON so that a test can change them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy

FIELDS, MODEL = "fields.json", "model.gguf"
WIDTH, HIDDEN, HEADS, LAYERS, WORDS = 32, 48, 4, 2, 40


def write_gguf(folder: Path) -> None:
    """Write a random Llama of two layers with a byte-pair vocabulary of letters into ``folder``."""
    letters = _letters()
    fields: dict[str, Any] = {
        "general.name": "tiny",
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "llama.vocab_size": len(letters),
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": letters,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(letters) - 2)],
        "tokenizer.ggml.merges": [f"Ġ {chr(97 + i)}" for i in range(10)],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    (folder / FIELDS).write_text(json.dumps(fields))
    rewrite_gguf(folder)


def _letters() -> list[str]:
    """Return the WORDS tokens of a byte-pair vocabulary of letters."""
    return ["<s>", "</s>", *(chr(97 + i) for i in range(26)), "Ġ", "Ċ", *(f"Ġ{chr(97 + i)}" for i in range(10))]


def rewrite_gguf(folder: Path) -> None:
    """Write ``model.gguf`` from ``fields.json``. A value that GGUF has no type for is left out."""
    from gguf import GGUFWriter

    file = folder / MODEL
    file.unlink(missing_ok=True)
    writer = GGUFWriter(file, "llama")
    fields = json.loads((folder / FIELDS).read_text())
    for name, value in fields.items() if isinstance(fields, dict) else ():
        _add(writer, name, value)
    generator = numpy.random.default_rng(0)
    for name, shape in _shapes().items():
        writer.add_tensor(name, generator.standard_normal(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        (writer.add_uint32 if 0 <= value < 2**32 else writer.add_int64)(name, value % 2**63)
    elif isinstance(value, float):
        writer.add_float32(name, numpy.float32(value))
    elif isinstance(value, str):
        writer.add_string(name, value.encode("utf-8", "replace").decode())
    elif (
        isinstance(value, list) and len({type(item) for item in value}) == 1 and isinstance(value[0], int | float | str)
    ):
        items = [item % 2**31 if type(item) is int else item for item in value]
        writer.add_array(name, [i.encode("utf-8", "replace").decode() if isinstance(i, str) else i for i in items])


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (WORDS, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (WORDS, WIDTH),
    }
    for i in range(LAYERS):
        layer = {f"attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
        layer |= {"attn_norm.weight": (WIDTH,), "ffn_norm.weight": (WIDTH,), "ffn_down.weight": (WIDTH, HIDDEN)}
        layer |= {"ffn_gate.weight": (HIDDEN, WIDTH), "ffn_up.weight": (HIDDEN, WIDTH)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


# transformers reads some widths from no GGUF file, and takes these: Qwen3's heads, and the experts of Qwen3 and Qwen2.
QWEN3, QWEN3_EXPERT, QWEN2_EXPERT, QWEN2_SHARED = 128, 768, 1408, 5632
_ROUTED = {"expert_count": 4, "expert_used_count": 2}
_BIASES = {"attn_q.bias": (64,), "attn_k.bias": (32,), "attn_v.bias": (32,)}
_GEMMA = {"post_attention_norm.weight": (64,), "post_ffw_norm.weight": (64,)}
_SHARED = {
    **{"ffn_gate_inp_shexp.weight": (64,), "ffn_gate_shexp.weight": (QWEN2_SHARED, 64)},
    **{"ffn_up_shexp.weight": (QWEN2_SHARED, 64), "ffn_down_shexp.weight": (64, QWEN2_SHARED)},
}


def _experts(width: int) -> dict[str, tuple[int, ...]]:
    stacked = {f"ffn_{part}_exps.weight": (4, width, 64) for part in ("gate", "up")}
    return {"ffn_gate_inp.weight": (4, 64), "ffn_down_exps.weight": (4, 64, width), **stacked}


def _normed(width: int) -> dict[str, tuple[int, ...]]:
    return {"attn_q_norm.weight": (width,), "attn_k_norm.weight": (width,)}


# Architecture → width of a head, fields besides those of every model, and shapes of a layer's tensors besides Llama's.
ARCHITECTURES: dict[str, tuple[int, dict[str, int], dict[str, tuple[int, ...]]]] = {
    "llama": (16, {}, {}),
    "qwen2": (16, {}, _BIASES),
    "qwen3": (QWEN3, {}, _normed(QWEN3)),
    "gemma2": (16, {}, _GEMMA),
    "gemma3": (16, {"attention.sliding_window": 16}, _GEMMA | _normed(16)),
    "qwen3moe": (QWEN3, _ROUTED, _experts(QWEN3_EXPERT) | _normed(QWEN3)),
    "qwen2moe": (16, _ROUTED, _experts(QWEN2_EXPERT) | _SHARED | _BIASES),
}


def write_architecture(file: Path, architecture: str, kind: str = "Q8_0", *, words: int = WORDS) -> None:
    """Write a random model of two layers and one of llama.cpp's architectures.

    Args:
        file: the file to write.
        architecture: one of ARCHITECTURES.
        kind: llama.cpp's name of the type that all matrices are quantised to.
        words: size of the vocabulary.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    width, fields, own = ARCHITECTURES[architecture]
    layer: dict[str, tuple[int, ...]] = {
        **{"attn_norm.weight": (64,), "ffn_norm.weight": (64,), "attn_q.weight": (4 * width, 64)},
        **{"attn_k.weight": (2 * width, 64), "attn_v.weight": (2 * width, 64), "attn_output.weight": (64, 4 * width)},
    }
    if not architecture.endswith("moe"):
        layer |= {"ffn_gate.weight": (96, 64), "ffn_up.weight": (96, 64), "ffn_down.weight": (64, 96)}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (words, 64), "output_norm.weight": (64,)}
    if not architecture.startswith("gemma"):
        shapes["output.weight"] = (words, 64)
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in (layer | own).items()}
    writer = GGUFWriter(file, architecture)
    numbers = {"block_count": LAYERS, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96}
    heads = {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": width}
    for name, value in (numbers | heads | fields).items():
        _add(writer, f"{architecture}.{name}", value)
    _add(writer, f"{architecture}.rope.freq_base", 10000.0)
    _add(writer, f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    _add(writer, "general.name", "tiny")
    # Without a field for its size, as in most files, the vocabulary is counted.
    _add(writer, "tokenizer.ggml.model", "gpt2")
    _add(writer, "tokenizer.ggml.tokens", _letters() + [f"t{i}" for i in range(WORDS, words)])
    _add(writer, "tokenizer.ggml.token_type", [3, 3, *[1] * (words - 2)])
    _add(writer, "tokenizer.ggml.merges", [f"Ġ {chr(97 + i)}" for i in range(10)])
    _add(writer, "tokenizer.ggml.bos_token_id", 0)
    _add(writer, "tokenizer.ggml.eos_token_id", 1)
    generator = numpy.random.default_rng(0)
    packed = GGMLQuantizationType[kind]
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, dtype=numpy.float32)
        if len(shape) == 1 or "_inp" in name:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, packed), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
