"""Llama 1/2/3, TinyLlama, SmolLM2 and every checkpoint that calls itself ``llama``."""

from transmla.families.base import Family, check_llama_like

FAMILY = Family(
    name="llama",
    check=check_llama_like,
    tiny={
        "vocab_size": 128,
        "hidden_size": 72,  # a multiple of 4, 6 and 9 heads
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
)
