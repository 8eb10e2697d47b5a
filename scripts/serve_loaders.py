"""Compare what other loaders compute from a native export with transformers: older versions, mlx-lm, onnxruntime.

    python scripts/serve_loaders.py reference EXPORT reference.json       # in the environment of transmla
    python scripts/serve_loaders.py compare EXPORT reference.json --loader mlx-lm    # in that of the loader

The reference holds greedy tokens of three prompts and their log-probabilities, in float32. `compare` reads the same
tokens with the loader, and counts the tokens that it would have chosen too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS = ("The history of the Roman Empire begins with", "def fibonacci(n):\n", "Water boils at a temperature of")
NEW_TOKENS = 32
# What reads the tokens of a sequence [T], and returns the logits [T, vocabulary] as an array.
Reader = Callable[[list[int]], Any]


def transformers_reader(folder: str) -> Reader:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def read(tokens: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].numpy()

    return read


def mlx_reader(folder: str) -> Reader:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)
    return lambda tokens: np.array(model(mx.array([tokens]))[0].astype(mx.float32))


def onnx_reader(folder: str) -> Reader:
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(folder, export=True, use_cache=False, use_io_binding=False)
    return lambda tokens: (
        model(input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.long))
        .logits[0]
        .numpy()
    )


LOADERS: dict[str, tuple[str, Callable[[str], Reader]]] = {
    "transformers": ("transformers", transformers_reader),
    "mlx-lm": ("mlx-lm", mlx_reader),
    "onnxruntime": ("onnxruntime", onnx_reader),
}


def write_reference(folder: str, file: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = model.generate(
            ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )[0]
        with torch.no_grad():
            scores = model(tokens[None]).logits.log_softmax(-1)[0, ids.shape[1] - 1 : -1]
        chosen = scores.gather(1, tokens[ids.shape[1] :, None])[:, 0]
        rows.append({"prompt": ids[0].tolist(), "tokens": tokens.tolist(), "log_probs": chosen.tolist()})
    file.write_text(json.dumps({"prompts": PROMPTS, "rows": rows}))


def compare(folder: str, reference: Path, loader: str) -> dict[str, Any]:
    """Return how many tokens are equal, and the largest difference of their log-probabilities."""
    import numpy as np

    package, make = LOADERS[loader]
    found: dict[str, Any] = {"loader": loader, "version": importlib.metadata.version(package)}
    expected = json.loads(reference.read_text())
    found["tokenizer"] = tokenized(folder, expected)
    read = make(folder)
    equal, largest = 0, 0.0
    for row in expected["rows"]:
        first, tokens = len(row["prompt"]), row["tokens"]
        logits = read(tokens)[first - 1 : -1].astype(np.float64)
        scores = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        scores -= logits.max(-1, keepdims=True)
        # With suppressed end tokens, the reference may have taken another than the best.
        equal += int((logits.argmax(-1) == np.array(tokens[first:])).sum())
        chosen = np.take_along_axis(scores, np.array(tokens[first:])[:, None], 1)[:, 0]
        largest = max(largest, float(np.abs(chosen - np.array(row["log_probs"])).max()))
    total = sum(len(row["tokens"]) - len(row["prompt"]) for row in expected["rows"])
    return found | {"equal tokens": equal, "tokens": total, "largest difference of log-probabilities": largest}


def tokenized(folder: str, expected: dict[str, Any]) -> str:
    """Return whether this environment's tokenizer gives the reference's tokens, or why it does not load."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    same = all(
        tokenizer(prompt)["input_ids"] == row["prompt"]
        for prompt, row in zip(expected["prompts"], expected["rows"], strict=True)
    )
    return "same tokens" if same else "other tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["reference", "compare"])
    parser.add_argument("export", help="folder of a native export")
    parser.add_argument("reference", type=Path, help="JSON file of the reference")
    parser.add_argument("--loader", choices=sorted(LOADERS), default="transformers")
    parser.add_argument("--result", type=Path, help="JSON file to which the comparison is added")
    arguments = parser.parse_args()
    if arguments.step == "reference":
        write_reference(arguments.export, arguments.reference)
        return
    found = compare(arguments.export, arguments.reference, arguments.loader)
    print(json.dumps(found))
    if arguments.result:
        rows = json.loads(arguments.result.read_text()) if arguments.result.exists() else []
        found["python"] = sys.version.split()[0]
        rows = [row for row in rows if (row["loader"], row["version"]) != (found["loader"], found["version"])]
        arguments.result.parent.mkdir(parents=True, exist_ok=True)
        arguments.result.write_text(json.dumps([*rows, found], indent=1) + "\n")


if __name__ == "__main__":
    main()
