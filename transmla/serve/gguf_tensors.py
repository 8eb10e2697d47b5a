"""The tensors of a GGUF file in llama.cpp's ``deepseek2`` layout: names, shapes, types, and how to make each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from transmla.serve.gguf_quantise import SUPER
from transmla.serve.gguf_scale import Scales

# Types of a tensor whose rows are no multiple of the wanted type's block.
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "Q5_0": "F16", "Q8_0": "F16"}
BLOCKS = {"Q4_K": SUPER, "Q6_K": SUPER, "Q5_0": 32, "Q8_0": 32}

LAYER = "model.layers.{}."
# Names in the export → names in the file.
ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
EXPAND = "self_attn.kv_b_proj.weight"


def export_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a native export with this ``config``, by name."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    rank, d_r, compressed = config["kv_lora_rank"], config["qk_rope_head_dim"], config.get("q_lora_rank")
    d_n, d_v = config["qk_nope_head_dim"], config["v_head_dim"]
    queries = heads * (d_n + d_r)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.kv_a_proj_with_mqa.weight": (rank + d_r, hidden),
        "self_attn.kv_a_layernorm.weight": (rank,),
        EXPAND: (heads * (d_n + d_v), rank),
        "self_attn.o_proj.weight": (hidden, heads * d_v),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if compressed:
        layer["self_attn.q_a_proj.weight"] = (compressed, hidden)
        layer["self_attn.q_a_layernorm.weight"] = (compressed,)
        layer["self_attn.q_b_proj.weight"] = (queries, compressed)
    else:
        layer["self_attn.q_proj.weight"] = (queries, hidden)
    vocabulary = (config["vocab_size"], hidden)
    ends = dict(zip(ENDS, (vocabulary, (hidden,), vocabulary), strict=True))
    return ends | {
        LAYER.format(i) + part: shape for i in range(config["num_hidden_layers"]) for part, shape in layer.items()
    }


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: name in the file.
        shape: shape, outermost dimension first.
        kind: type of GGUF, such as Q8_0.
        make: reads the tensor of the export and returns this one, in float32.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], Tensor]


def list_tensors(
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    scales: Scales,
    file_type: str,
) -> Iterator[GgufTensor]:
    """List the tensors of the file in their order.

    Args:
        config: the export's config.
        shapes: shapes of the export's tensors, by name.
        read: returns the export's tensor with a given name.
        scales: the powers of two by which tensors are multiplied.
        file_type: key of ``FILE_TYPES``.
    """
    layers = config["num_hidden_layers"]

    def tensor(source: str, target: str, layer: int = 0) -> GgufTensor:
        shape = shapes[source]
        kind = tensor_type(target, shape, file_type, layer, layers)
        return GgufTensor(target, shape, kind, lambda: scales.apply(source, read(source)))

    yield from (tensor(source, target) for source, target in ENDS.items())
    for layer in range(layers):
        prefix = LAYER.format(layer)
        for part, target in PARTS.items():
            if prefix + part in shapes:
                yield tensor(prefix + part, f"blk.{layer}.{target}", layer)
        yield from _expansion(config, prefix + EXPAND, read, file_type, layer)


def _expansion(
    config: dict[str, Any], source: str, read: Callable[[str], Tensor], file_type: str, layer: int
) -> Iterator[GgufTensor]:
    """Split ``kv_b_proj`` [H·(d_n + d_v), r] into ``attn_k_b`` [H, r, d_n] and ``attn_v_b`` [H, d_v, r]."""
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    d_n, d_v = config["qk_nope_head_dim"], config["v_head_dim"]

    def keys() -> Tensor:
        return read(source).float().view(heads, d_n + d_v, rank)[:, :d_n].transpose(1, 2)

    def values() -> Tensor:
        return read(source).float().view(heads, d_n + d_v, rank)[:, d_n:]

    for name, shape, make in (("k", (heads, rank, d_n), keys), ("v", (heads, d_v, rank), values)):
        target = f"blk.{layer}.attn_{name}_b.weight"
        kind = tensor_type(target, shape, file_type, layer, config["num_hidden_layers"])
        yield GgufTensor(target, shape, kind, make)


def tensor_type(name: str, shape: tuple[int, ...], file_type: str, layer: int, layers: int) -> str:
    """Return the type of a tensor, as llama-quantize would choose it.

    Norms are F32. In a Q4_K_M file, Q6_K serves the head, and the values and ``ffn_down`` of half the layers: the
    first and the last eighth, and each third layer between. ``attn_kv_a_mqa`` is Q8_0 there: it is small, and every
    head reads what it computes.
    """
    if len(shape) == 1:
        return "F32"
    if file_type != "q4_k_m":
        return _fitting(file_type.upper(), shape[-1])
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    if name.endswith("attn_kv_a_mqa.weight"):
        return _fitting("Q8_0", shape[-1])
    important = name == "output.weight" or (more and name.endswith(("attn_v_b.weight", "ffn_down.weight")))
    return _fitting("Q6_K" if important else "Q4_K", shape[-1])


def _fitting(kind: str, width: int) -> str:
    """Return ``kind``, or the type that replaces it where rows of ``width`` are no multiple of its block."""
    while width % BLOCKS.get(kind, 1):
        kind = FALLBACK[kind]
    return kind


def count_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Return the bytes of a tensor's data."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return math.prod(shape) // block * size
