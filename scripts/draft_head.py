"""Train an EAGLE-3 style draft head on a source, and measure it on the source and on its export.

    python scripts/draft_head.py collect SOURCE STATES --text wikitext --text stdlib
    python scripts/draft_head.py train SOURCE STATES HEAD
    python scripts/draft_head.py measure SOURCE EXPORT HEAD --text wikitext:test.txt --text stdlib

``collect`` lets the model continue excerpts of the texts, and writes the hidden states of both to the file STATES.
``train`` trains a head on them and writes it to the folder HEAD. With ``--start``, training begins with another head:
``collect EXPORT`` and ``train EXPORT --start HEAD`` adapt a head to an export.

``measure`` writes behind prompts from the test splits of the texts, and from the edits of code that
``scripts/speculation.py`` uses. A step verifies the whole draft. Measured for each model, text and draft length:
    tokens/s        new tokens in a second, after the first token; on a CPU, in a second that the process computes,
                    summed over its threads
    tokens a step   new tokens for each step of the model; one of them is its own, the others were drafted
    changed         new tokens that differ from those of ``generate`` without drafts
    gap             smallest distance of the two best logits where a text first differs; None if none does
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import speculation
import torch
from draft_head_model import Drafter, DraftHead, new_head, read_states, unrolled_loss, write_drafted
from provenance import RESULTS, write_result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

import transmla
from transmla.source.text import load_blocks, text_options

# Every so many blocks, one is held out from training.
HELD_OUT = 20
# Blocks that are continued or read at once.
AT_ONCE = 32
EDITS = "edits of code"


def blocks_of(text: str, tokenizer: Any, count: int, length: int, split: str) -> Tensor:
    """Return ``count`` blocks [count, length] of a text, of its ``split`` if it has splits."""
    chosen = split if "split" in text_options(text) else None
    return load_blocks(text, tokenizer, sequences=count, length=length, split=chosen)


@torch.no_grad()
def collect(model: Any, blocks: Tensor, written: int) -> dict[str, Tensor]:
    """Return what a head is trained on.

    Args:
        model: the target.
        blocks: tokens that the model reads, [N, T].
        written: tokens that the model writes behind each block, greedily.

    Returns:
        ``tokens`` [N, T + written], and in bfloat16 ``states`` [N, T + written, 3, d] for the head and ``last``
        [N, T + written, d] for the output matrix.
    """
    parts: dict[str, list[Tensor]] = {"tokens": [], "states": [], "last": []}
    for block in blocks.split(AT_ONCE):
        if written:
            length = {"max_new_tokens": written, "min_new_tokens": written, "do_sample": False, "pad_token_id": 0}
            block = model.generate(block.to(model.device), attention_mask=torch.ones_like(block), **length)
        found = model.model(block.to(model.device), output_hidden_states=True, use_cache=False).hidden_states
        parts["tokens"].append(block.cpu())
        parts["states"].append(read_states(model, found).to("cpu", torch.bfloat16))
        parts["last"].append(found[-1].to("cpu", torch.bfloat16))
        print(f"collected {sum(map(len, parts['tokens']))} of {len(blocks)} blocks", flush=True)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def frequent(tokens: Tensor, size: int, vocabulary: int) -> Tensor:
    """Return the ``size`` most frequent of ``vocabulary`` token ids in ``tokens``, in order, [size]."""
    counts = torch.bincount(tokens.flatten(), minlength=vocabulary)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def train(
    drafter: Drafter, data: dict[str, Tensor], *, steps: int, batch: int, rate: float, unroll: int
) -> list[dict[str, Any]]:
    """Train the head of ``drafter`` in place.

    Args:
        drafter: the head with its target.
        data: see ``collect``.
        steps: training steps.
        batch: blocks in a step.
        rate: peak learning rate.
        unroll: steps of the training-time test.

    Returns:
        Step, seconds, mean training loss since the last row, held-out loss, and held-out agreement of each unrolled
        step; every tenth of the training.
    """
    head, device, dtype = drafter.head, drafter.rows.device, drafter.rows.dtype
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    numbers = torch.arange(len(data["tokens"]))
    held_out, kept = numbers[numbers % HELD_OUT == 0], numbers[numbers % HELD_OUT > 0]

    def loss_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        states, last = (data[name][rows].to(device, dtype) for name in ("states", "last"))
        return unrolled_loss(drafter, states, last, data["tokens"][rows].to(device), unroll)

    generator, start, order = torch.Generator().manual_seed(0), time.perf_counter(), kept[:0]
    history: list[dict[str, Any]] = []
    losses: list[float] = []
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = kept[torch.randperm(len(kept), generator=generator)]
        loss, _ = loss_of(order[:batch])
        order = order[batch:]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % max(1, steps // 10) == 0 or step == steps:
            with torch.no_grad():
                checks = [loss_of(rows) for rows in held_out.split(batch)]
            agreement = torch.stack([found for _, found in checks]).mean(0)
            history.append(
                {
                    "training step": step,
                    "seconds": round(time.perf_counter() - start, 1),
                    "loss": round(sum(losses) / len(losses), 4),
                    "held-out loss": round(float(torch.stack([found for found, _ in checks]).mean()), 4),
                    "held-out agreement": [round(value, 4) for value in agreement.tolist()],
                }
            )
            losses.clear()
            print(history[-1], flush=True)
    return history


def measure(
    model: Any, head: DraftHead, texts: dict[str, list[Tensor]], lengths: list[int], tokens: int
) -> list[dict[str, Any]]:
    """Measure ``head`` on ``model``: a row for each text and draft length. Length 0 is plain decoding.

    Args:
        model: the target.
        head: the head; it need not have been trained on ``model``.
        texts: prompts [1, T] by the name of their text.
        lengths: tokens of a draft.
        tokens: largest number of new tokens for each prompt.
    """
    drafter, rows = Drafter(head, model), []
    for text, prompts in texts.items():
        plain: list[Tensor] = []
        speculation.measure(model, prompts, plain, tokens)
        rate = 0.0
        for drafted in lengths:
            write = functools.partial(write_drafted, drafter=drafter, drafted=drafted)
            found = speculation.measure(model, prompts, plain, tokens, write=write)
            rate = rate or found["tokens/s"]
            rows.append({"text": text, "drafted": drafted, **found, "speedup": round(found["tokens/s"] / rate, 2)})
            print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    collecting = verbs.add_parser("collect", help="write the hidden states of a model to a file")
    collecting.add_argument("model", help="source or export")
    collecting.add_argument("states", type=Path, help="file to write")
    collecting.add_argument("--sequences", type=int, default=256, help="blocks of each text")
    collecting.add_argument("--length", type=int, default=128, help="tokens of a block that come from the text")
    collecting.add_argument("--written", type=int, default=128, help="tokens that the model writes behind a block")
    training = verbs.add_parser("train", help="train a head on hidden states")
    training.add_argument("model", help="the model of these states")
    training.add_argument("states", type=Path, help="file that collect wrote")
    training.add_argument("head", type=Path, help="folder to write")
    training.add_argument("--start", type=Path, help="head to begin with (default: a random one)")
    training.add_argument("--vocabulary", type=int, default=8192, help="tokens that the head can draft")
    training.add_argument("--steps", type=int, default=600, help="training steps")
    training.add_argument("--batch", type=int, default=4, help="blocks in a step")
    training.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    training.add_argument("--unroll", type=int, default=3, help="steps of the training-time test")
    measuring = verbs.add_parser("measure", help="measure a head on source and export")
    measuring.add_argument("source", help="model before conversion")
    measuring.add_argument("export", help="its export")
    measuring.add_argument("head", type=Path, help="head that was trained on the source")
    measuring.add_argument("--adapted", type=Path, help="head that was trained further on the export")
    measuring.add_argument("--prompts", type=int, default=6, help="prompts of each text")
    measuring.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    measuring.add_argument("--drafted", type=int, nargs="+", default=[1, 2, 3, 4], help="tokens of a draft")
    measuring.add_argument("--tokens", type=int, default=64, help="largest number of new tokens for each prompt")
    measuring.add_argument("--result", type=Path, default=RESULTS / "speculation/head.json", help="JSON file to write")
    for verb in (collecting, measuring):
        verb.add_argument("--text", action="append", required=True, help="named text, file or Hub dataset; repeatable")
    for verb in (training, measuring):
        verb.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    for verb in (collecting, training, measuring):
        verb.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    kind, device = {"dtype": torch.float32}, torch.device(arguments.device)
    if arguments.verb == "measure":
        tokenizer = AutoTokenizer.from_pretrained(arguments.source)
        texts = {EDITS: speculation.prompts(tokenizer, device)}
        for text in arguments.text:
            blocks = blocks_of(text, tokenizer, arguments.prompts, arguments.length, "test")
            texts[Path(text).name] = list(blocks.to(device).split(1))
        runs = [("source", arguments.source, arguments.head), ("export", arguments.export, arguments.head)]
        runs += [("export", arguments.export, arguments.adapted)] if arguments.adapted else []
        rows: list[dict[str, Any]] = []
        for role, name, folder in runs:
            load = AutoModelForCausalLM.from_pretrained if role == "source" else transmla.load
            model, head = load(name, **kind).to(device).eval(), DraftHead.from_pretrained(folder, **kind)
            print(role, name, folder)
            found = measure(model, head.to(device).eval(), texts, [0, *arguments.drafted], arguments.tokens)
            rows += [{"model": role, "name": Path(name).name, "head": folder.name, **row} for row in found]
            write_result(arguments.result, rows, arguments.commit)
        return
    model = AutoModelForCausalLM.from_pretrained(arguments.model, **kind).to(device).eval().requires_grad_(False)
    if arguments.verb == "collect":
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        found = [blocks_of(text, tokenizer, arguments.sequences, arguments.length, "train") for text in arguments.text]
        blocks = torch.cat(found)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
        save_file(collect(model, blocks[order], arguments.written), arguments.states)
        return
    data = load_file(arguments.states)
    torch.manual_seed(0)
    if arguments.start:
        head = DraftHead.from_pretrained(arguments.start, **kind)
    else:
        head = new_head(model.config, frequent(data["tokens"], arguments.vocabulary, model.config.vocab_size))
    settings = {name: getattr(arguments, name) for name in ("steps", "batch", "rate", "unroll")}
    history = train(Drafter(head.to(device), model), data, **settings)
    head.save_pretrained(arguments.head)
    write_result(arguments.head / "training.json", history, arguments.commit)


if __name__ == "__main__":
    main()
