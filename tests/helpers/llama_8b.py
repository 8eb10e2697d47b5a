"""The attention of Llama-3.1-8B, as its config describes it."""

from __future__ import annotations

import torch

from transmla.artifacts import AttentionSpec

LLAMA_8B = AttentionSpec(
    family="llama",
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    inv_freq=tuple((1 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128)).double().tolist()),
    attention_factor=1.0,
    scaling=128**-0.5,
    layer_parameters=3 * 4096 * 14336 + 2 * 4096,
    other_parameters=32 * (3 * 4096 * 14336 + 2 * 4096) + 4096 + 2 * 128256 * 4096,
)
