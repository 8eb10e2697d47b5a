"""Measure what quantisers and low-rank updates make of a model and of its export.

    pip install torchao peft
    python scripts/serve_quantised.py MODEL EXPORT --text train.txt

int8 by torchao: mean absolute change of the log-probabilities of greedy tokens, against the same model in bfloat16.
LoRA on all linear layers by peft: losses of 20 steps on a short text, and the gradient's norm in the first.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, write_result
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("The history of the Roman Empire begins with", "def fibonacci(n):\n", "Water boils at a temperature of")
NEW_TOKENS = 32
RATES = (1e-4, 1e-3)
STEPS, SEQUENCES, LENGTH = 20, 2, 64
RANK = 8


def load(folder: str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def continued(model: Any, tokenizer: Any) -> list[tuple[int, Tensor]]:
    """Return the length of each prompt, and its tokens [1, T] with a greedy continuation."""
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = model.generate(
            ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        found.append((ids.shape[1], tokens))
    return found


@torch.no_grad()
def scores(model: Any, texts: list[tuple[int, Tensor]]) -> tuple[Tensor, int]:
    """Return the log-probabilities of all new tokens, and how many of them the model would choose."""
    found, equal = [], 0
    for first, tokens in texts:
        logits = model(tokens).logits.float().log_softmax(-1)[0, first - 1 : -1]
        found.append(logits.gather(1, tokens[0, first:, None])[:, 0])
        equal += int((logits.argmax(-1) == tokens[0, first:]).sum())
    return torch.cat(found), equal


def quantised(folder: str, tokenizer: Any) -> dict[str, Any]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    model = load(folder, torch.bfloat16)
    texts = continued(model, tokenizer)
    before, _ = scores(model, texts)
    found: dict[str, Any] = {}
    for name, config in (("weights", Int8WeightOnlyConfig()), ("dynamic", Int8DynamicActivationInt8WeightConfig())):
        model = load(folder, torch.bfloat16)
        quantize_(model, config)
        after, equal = scores(model, texts)
        found[f"int8 {name}"] = {"change": float((after - before).abs().mean()), "equal": equal, "tokens": len(before)}
    return found


def trained(folder: str, ids: Tensor, rate: float) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        load(folder, torch.float32), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    ).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = model(ids, labels=ids).loss
        loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])))
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return {"rate": rate, "losses": losses, "first gradient": norms[0], "largest gradient": max(norms)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders: the source first, then exports")
    parser.add_argument("--text", type=Path, required=True, help="text to train on")
    parser.add_argument("--result", type=Path, default=RESULTS / "serve/quantised.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.models[0])
    text = arguments.text.read_text(encoding="utf-8")[: 20 * SEQUENCES * LENGTH]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0, : SEQUENCES * LENGTH].view(SEQUENCES, LENGTH)
    rows: list[dict[str, Any]] = []
    for folder in arguments.models:
        row: dict[str, Any] = {"model": Path(folder).name, **quantised(folder, tokenizer)}
        row["lora"] = [trained(folder, ids, rate) for rate in RATES]
        print(row, flush=True)
        rows.append(row)
        write_result(arguments.result, rows, arguments.commit)


if __name__ == "__main__":
    main()
