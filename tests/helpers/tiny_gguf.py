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
    letters = ["<s>", "</s>", *(chr(97 + i) for i in range(26)), "Ġ", "Ċ", *(f"Ġ{chr(97 + i)}" for i in range(10))]
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
