"""Train a small model of a family on `pydoc`, for families without a real checkpoint at hand: minutes on a CPU.

    python scripts/train_small.py qwen3 small-qwen3
    python scripts/train_small.py gemma3_text small-gemma3 --large

Conversions must be compared on trained models: with random weights, spectra are flat, no rotary frequency matters more
than another, and norms are one. Training must not go on for too long: a model that has memorised a text attends to that
text in its own way. The script keeps the state with the lowest loss on the last tenth of the train split. ``--large``
makes norms and biases large before training, as in some released models.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from transmla.source.text import load_tokens
from transmla.source.texts.pydoc import pydoc_text

VOCABULARY, LENGTH, BATCH = 2048, 256, 16
START = "<s>"
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
WINDOWS = {"sliding_window": 64, "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": WINDOWS | {"query_pre_attn_scalar": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256},
}


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on ``text``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[START], initial_alphabet=alphabet)
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=START, eos_token=START, pad_token=START)


def make_model(family: str, *, large: bool) -> Any:
    """Return a model with random weights.

    Args:
        family: a key of FAMILIES.
        large: whether norms are multiplied by the exponential of a standard normal, and biases are standard normal.
    """
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Gemma's norms multiply by 1 + weight.
    offset = 1 if family.startswith("gemma") else 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if large and name.endswith("bias"):
                parameter.normal_()
            elif large and parameter.dim() == 1:
                parameter.copy_((offset + parameter) * torch.randn_like(parameter).exp() - offset)
    return model


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences of one stream of tokens, each overlapping the one before by half, with ``START`` as the first token.

    ``limit``: largest number of sequences; None takes all.
    """

    def __init__(self, tokens: Tensor, start: int, length: int, limit: int | None = None) -> None:
        self.rows = tokens.unfold(0, length, length // 2)[:limit].clone()
        self.rows[:, 0] = start

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(FAMILIES), help="model_type to train")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=600, help=f"steps of {BATCH} sequences of {LENGTH} tokens")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--windows", type=int, help="windows of each held-out text to measure on (default: all)")
    parser.add_argument("--large", action="store_true", help="make norms and biases large before training")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = make_tokenizer(pydoc_text("train"))
    train_text, test_text = (load_tokens("pydoc", tokenizer, split=split) for split in ("train", "test"))
    cut = len(train_text) * 9 // 10
    start = tokenizer.bos_token_id
    train = Windows(train_text[:cut], start, LENGTH)
    validation, test = (Windows(part, start, LENGTH, arguments.windows) for part in (train_text[cut:], test_text))
    model = make_model(arguments.family, large=arguments.large)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=arguments.rate,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 20,
            weight_decay=0.05,
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=min(50, arguments.steps),
            save_strategy="best",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            report_to=[],
        ),
        train_dataset=train,
        eval_dataset=validation,
    )
    trainer.train()
    perplexity = math.exp(trainer.evaluate(test)["eval_loss"])
    trainer.save_model(str(arguments.output))
    for checkpoint in arguments.output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    tokenizer.save_pretrained(arguments.output)
    steps = trainer.state.best_global_step
    summary = {"family": arguments.family, "steps": steps, "held-out perplexity": round(perplexity, 3)}
    record = provenance(arguments.commit) | summary
    (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{arguments.output}: {steps} steps, perplexity {perplexity:.2f} on pydoc's test split")


if __name__ == "__main__":
    main()
