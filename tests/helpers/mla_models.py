"""Tiny random models of the MLA families in transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

# MLA families of transformers, and the settings that differ between their configs.
FAMILIES = {
    "deepseek_v2": {"q_lora_rank": 12, "num_experts_per_tok": 2},
    "deepseek_v3": {"q_lora_rank": None, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    "glm4_moe_lite": {"q_lora_rank": 12, "num_experts_per_tok": 2},
    "minicpm3": {"q_lora_rank": 12},
    "youtu": {"q_lora_rank": 12},
}
# Tokens of a prompt, and padded tokens of its first row.
PROMPT, PADDED = 20, 6


def tiny(family: str = "deepseek_v3", **changes: Any) -> Any:
    """Return a random MLA model whose weights are large enough for attention that is far from uniform."""
    settings = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "head_dim": 8,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        **FAMILIES[family],
        **changes,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 2 / parameter.shape[-1] ** 0.5)
    return model


def prompt(padded: int = PADDED) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask`` [2, PROMPT], with ``padded`` tokens on the left of the first row."""
    tokens = torch.randint(2, 96, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    tokens[0, :padded], mask[0, :padded] = 1, 0
    return {"input_ids": tokens, "attention_mask": mask}
