"""Build tiny sources: a real tokenizer, and a real model of any family, attention layout and RoPE type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from transmla.registry import scan

# (query heads, key/value heads)
LAYOUTS = {"mha": (4, 4), "gqa": (6, 3), "gqa9": (9, 3), "mqa": (4, 1)}

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def build_tokenizer(folder: Path, vocab_size: int = 128) -> None:
    """Save a byte-level tokenizer with a chat template into ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the log"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)


def build_model(family: str = "llama", layout: str = "gqa", rope: str = "default", **changes: Any) -> Any:
    """Return a tiny random causal LM in float32. Its weights are large enough that attention is not uniform.

    Args:
        family: model family, a ``model_type`` of transformers.
        layout: key of ``LAYOUTS``.
        rope: key of ``ROPES``.
        changes: further config attributes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    heads, kv_heads = LAYOUTS[layout]
    settings = {
        **scan("transmla.families", "FAMILY")[family].tiny,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        # A copy: some configs write into their rope_parameters.
        "rope_parameters": dict(ROPES[rope]),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        **changes,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 2.0 / parameter.shape[-1] ** 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


# Settings of a healing of twelve steps.
SMALL_HEALING = {"length": 32, "batch": 8, "held_out": 4, "max_tokens": 32 * 8 * 12, "eval_every": 3, "save_every": 5}
