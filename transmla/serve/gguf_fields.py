"""The fields in the header of a GGUF file: architecture, tokenizer, name and licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transmla.export.manifest import Manifest
from transmla.serve.gguf_tokenizer import Vocabulary
from transmla.serve.request import FILE_TYPES

ARCHITECTURE = "deepseek2"
# Version of the layout of quantised blocks (GGML_QNT_VERSION).
QUANTISATION = 2


def open_writer(
    file: Path, manifest: Manifest, config: dict[str, Any], vocabulary: Vocabulary, eps: float, file_type: str
) -> Any:
    """Return gguf's writer for ``file``, with all fields of the header; ``eps`` is the rescaled eps of all norms."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, ARCHITECTURE)
    writer.add_type("model")
    writer.add_name(manifest.source.name)
    writer.add_tags(["mla", "transmla"])
    card = manifest.source.card
    for field, add in (
        ("license", writer.add_license),
        ("license_name", writer.add_license_name),
        ("license_link", writer.add_license_link),
    ):
        if isinstance(card.get(field), str):
            add(card[field])
    writer.add_file_type(FILE_TYPES[file_type])
    writer.add_quantization_version(QUANTISATION)
    _add_shape(writer, config, eps)
    add_vocabulary(writer, vocabulary)
    return writer


def _add_shape(writer: Any, config: dict[str, Any], eps: float) -> None:
    """Add the fields of the architecture. A latent is one key/value head of width r + d_r, whose values are r wide."""
    rank, d_r = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(eps)
    writer.add_rope_freq_base(float(config["rope_parameters"]["rope_theta"]))
    writer.add_rope_dimension_count(d_r)
    writer.add_q_lora_rank(config.get("q_lora_rank") or 0)
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + d_r)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + d_r)
    writer.add_value_length_mla(config["v_head_dim"])
    # Every layer is dense. llama.cpp reads the sizes of experts all the same.
    writer.add_leading_dense_block_count(config["num_hidden_layers"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_shared_count(0)


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add the fields of the tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.model == "llama":
        writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)
