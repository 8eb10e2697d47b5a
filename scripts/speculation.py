"""Measure speculative decoding of a source and of its export on code that is edited.

    python scripts/speculation.py SOURCE EXPORT --assistant SMALLER --tokens 256

``SMALLER`` is a smaller model with the same tokenizer, or an export of the same source with a smaller cache. The
prompts show a function of this repository, ask for it with one change, and begin the answer. All models decode
greedily.

Ways:
    plain          one token a step
    prompt lookup  drafts are copied from the prompt (``prompt_lookup_num_tokens``)
    assistant      drafts are written by the assistant (``assistant_model``)

Measured for each model and way, over all prompts:
    tokens/s        new tokens in a second, after the first token
    tokens a step   new tokens for each forward pass of the model; one of them is its own, the others were drafted
    changed         new tokens that differ from those of the plain way, up to the end of the shorter text
    gap             smallest distance of the two best logits where a text first differs; None if none does
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, write_result
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import transmla
from transmla.evaluate.bench import copy_bandwidth
from transmla.kernels.splits import best_splits
from transmla.runtime.forms import crossover
from transmla.runtime.graphed_model import graphs_of
from transmla.runtime.packed_rows import pack

# Functions and the change that is asked for.
EDITS: list[tuple[Callable[..., Any], str]] = [
    (crossover, "Rename the variable `rebuilt` to `expanded`."),
    (copy_bandwidth, "Rename the variable `target` to `destination`."),
    (best_splits, "Rename the parameter `units` to `processors`."),
    (pack, "Remove the docstring."),
]
# Tokens of a draft that prompt lookup copies at most.
COPIED = 8


def prompts(tokenizer: Any, device: torch.device) -> list[Tensor]:
    """Return the prompts as tokens [1, T]."""
    found = []
    for function, change in EDITS:
        code = inspect.getsource(inspect.unwrap(function))
        asked = f"{change} Answer with the whole function and nothing else.\n\n```python\n{code}```"
        turns = [{"role": "user", "content": asked}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + "```python\n"
        found.append(tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(device))
    return found


def write(model: Any, prompt: Tensor, tokens: int, **settings: Any) -> tuple[Tensor, int, float]:
    """Return the new tokens [n] behind ``prompt``, the forward passes after the prompt's, and their seconds."""
    passes: list[float] = []

    def note(*_: Any) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        passes.append(time.perf_counter())

    hook = model.register_forward_hook(note)
    try:
        fixed = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), **fixed, **settings)
    finally:
        hook.remove()
    return written[0, prompt.shape[1] :], len(passes) - 1, time.perf_counter() - passes[0]


@torch.no_grad()
def gap(model: Any, prompt: Tensor, new: Tensor, at: int) -> float:
    """Return the distance of the two best logits for token ``at`` of ``new`` [n]."""
    tokens = torch.cat([prompt[0], new[:at]])[None]
    best = model(tokens, logits_to_keep=1).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def measure(
    model: Any,
    texts: list[Tensor],
    plain: list[Tensor],
    tokens: int,
    *,
    write: Callable[..., tuple[Tensor, int, float]] = write,
    **settings: Any,
) -> dict[str, Any]:
    """Measure one way.

    Args:
        model: the model.
        texts: the prompts [1, T].
        plain: receives the new tokens of each prompt if it is empty; else they are compared with the new ones.
        tokens: largest number of new tokens.
        write: decodes as the function ``write`` above does.
        settings: arguments of ``write`` that choose the way, by default of ``generate``.
    """
    write(model, texts[0], 16, **settings)
    runs = [write(model, text, tokens, **settings) for text in texts]
    if not plain:
        plain += [new for new, _, _ in runs]
    changed, gaps = 0, []
    for text, before, (new, _, _) in zip(texts, plain, runs, strict=True):
        both = min(len(before), len(new))
        differs = (before[:both] != new[:both]).nonzero()
        changed += len(differs)
        if len(differs):
            gaps.append(gap(model, text, before, int(differs[0])))
    written, passes, seconds = (sum(part) for part in zip(*((len(new) - 1, n, t) for new, n, t in runs), strict=True))
    return {
        "tokens": written,
        "tokens/s": round(written / seconds, 2),
        "tokens a step": round(written / passes, 2),
        "changed": changed,
        "gap": round(min(gaps), 4) if gaps else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="model before conversion")
    parser.add_argument("export", help="its export")
    parser.add_argument("--assistant", help="model that writes drafts; without one, the way is left out")
    parser.add_argument("--tokens", type=int, default=256, help="largest number of new tokens for each prompt")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32", help="precision")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    parser.add_argument("--result", type=Path, default=RESULTS / "speculation/result.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    kind, device = {"dtype": getattr(torch, arguments.dtype)}, torch.device(arguments.device)
    texts = prompts(AutoTokenizer.from_pretrained(arguments.source), device)
    assistant = transmla.load(arguments.assistant, **kind).to(device) if arguments.assistant else None
    ways: dict[str, dict[str, Any]] = {"plain": {}, "prompt lookup": {"prompt_lookup_num_tokens": COPIED}}
    if assistant is not None:
        ways["assistant"] = {"assistant_model": assistant}
    rows: list[dict[str, Any]] = []
    for role, name in (("source", arguments.source), ("export", arguments.export)):
        load = AutoModelForCausalLM.from_pretrained if role == "source" else transmla.load
        model, plain, rate = load(name, **kind).to(device).eval(), [], 0.0
        graphs = graphs_of(model)
        for way, settings in ways.items():
            measured = measure(model, texts, plain, arguments.tokens, **settings)
            rows.append({"model": role, "name": Path(name).name, "way": way, **measured})
            rate = rate or measured["tokens/s"]
            rows[-1]["speedup"] = round(measured["tokens/s"] / rate, 2)
            if graphs is not None:
                rows[-1]["replayed steps"] = graphs.replays
            print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
            write_result(arguments.result, rows, arguments.commit)
        del model


if __name__ == "__main__":
    main()
