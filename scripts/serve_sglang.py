"""Compare what SGLang generates from exports with transformers: greedy tokens, and log-probs of a given text.

SGLang usually has an environment of its own, so this script has two parts:

    python scripts/serve_sglang.py reference exports/reference.json llama native-512-64   # folders beside the file
    python scripts/serve_sglang.py compare exports/reference.json --backends triton fa3

The first part runs in the environment of transmla. The second part runs in SGLang's, where transmla is installed as
well, and writes results/serve/sglang.json. Each export runs in a process of its own, several at once.

SGLang's kernels compute in bfloat16. The reference has the same weights, rounded to bfloat16, but computes in float32.
Run a source beside its exports to see how much of a difference is rounding. Prompts are seeded tokens, so the exports
need no tokenizer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, write_result

PROMPTS, LENGTH, TOKENS = 3, 12, 32
# SGLang's cache in tokens, and the share of the GPU that it may use. Several servers share one GPU.
CACHE, SHARE = 4096, 0.5
# First port of the servers, and the ports for each.
PORT, PORTS = 31000, 200


@torch.no_grad()
def reference(folder: Path) -> list[dict[str, Any]]:
    """Return, for each prompt, its ids, the greedy tokens of transformers, their log-probs and leads.

    A lead is the distance in log-prob to the second most probable token: rounding may change tokens with a small one.
    """
    from transformers import AutoModelForCausalLM

    import transmla

    transmla.register()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    model = loaded.float().eval()
    # Texts go on after an end token, as SGLang's do with ignore_eos.
    model.generation_config.eos_token_id = None
    seeded = torch.Generator().manual_seed(0)
    rows = []
    for ids in torch.randint(3, model.config.vocab_size, (PROMPTS, 1, LENGTH), generator=seeded):
        made = model.generate(
            ids, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        tokens = made.sequences[0, LENGTH:]
        logprobs = torch.cat(made.logits).float().log_softmax(-1)
        best = logprobs.topk(2).values
        rows.append(
            {
                "prompt": ids[0].tolist(),
                "tokens": tokens.tolist(),
                "logprobs": logprobs.gather(1, tokens[:, None])[:, 0].tolist(),
                "leads": (best[:, 0] - best[:, 1]).tolist(),
            }
        )
    return rows


def serve(folder: Path, rows: list[dict[str, Any]], backend: str, place: int) -> dict[str, Any]:
    """Serve one export with SGLang, and return what it makes of the ``rows`` of a reference.

    Args:
        folder: the export.
        rows: the export's entry of the reference.
        backend: SGLang's attention backend.
        place: number of this server, which chooses its ports.
    """
    import sglang

    started = time.perf_counter()
    engine = sglang.Engine(
        model_path=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        attention_backend=backend,
        max_total_tokens=CACHE,
        mem_fraction_static=SHARE,
        cuda_graph_max_bs_decode=4,
        port=PORT + PORTS * place,
        log_level="info",
    )
    ready = time.perf_counter() - started
    prompts = [row["prompt"] for row in rows]
    greedy = engine.generate(
        input_ids=prompts,
        sampling_params={"temperature": 0.0, "max_new_tokens": TOKENS, "ignore_eos": True},
        return_logprob=True,
    )
    forced = engine.generate(
        input_ids=[row["prompt"] + row["tokens"] for row in rows],
        sampling_params={"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
    )
    found = summary(rows, greedy, forced)
    engine.shutdown()
    return found | {"seconds to start": round(ready, 1), "sglang": sglang.__version__}


def summary(rows: list[dict[str, Any]], greedy: list[Any], forced: list[Any]) -> dict[str, Any]:
    """Compare SGLang's outputs with the reference.

    Args:
        rows: the reference.
        greedy: outputs of the greedy continuations of the prompts.
        forced: outputs whose prompts are the reference's whole texts.
    """
    equal, worst, leads, differences = 0, 0.0, [], []
    for row, made, given in zip(rows, greedy, forced, strict=True):
        for i, (logprob, token, *_) in enumerate(made["meta_info"]["output_token_logprobs"]):
            if token != row["tokens"][i]:  # later tokens continue another text
                leads.append(round(row["leads"][i], 4))
                break
            equal += 1
            worst = max(worst, abs(logprob - row["logprobs"][i]))
        read = [logprob for logprob, *_ in given["meta_info"]["input_token_logprobs"]][-TOKENS:]
        differences += [abs(a - b) for a, b in zip(read, row["logprobs"], strict=True)]
    return {
        "tokens": TOKENS * len(rows),
        "tokens equal": equal,
        "leads where texts part": leads,
        "largest difference in decoding": worst,
        "largest difference in prefill": max(differences),
        "mean difference in prefill": sum(differences) / len(differences),
    }


def in_process(args: argparse.Namespace, entry: dict[str, Any], backend: str, place: int) -> dict[str, Any]:
    """Run ``serve`` in a process of its own, and return a row of the result, with the reason if it failed."""
    folder = args.file.parent / entry["name"]
    config = json.loads((folder / "config.json").read_text())
    row = {
        "export": entry["name"],
        "backend": backend,
        "family": config.get("source_model_type", config["model_type"]),
        "format": {"transmla": "transmla", "deepseek_v3": "native"}.get(config["model_type"], "source"),
        "layers": config["num_hidden_layers"],
    }
    command = [sys.executable, __file__, "one", str(args.file), entry["name"], backend, str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
        log = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        log = "".join(part.decode(errors="replace") for part in (error.stdout, error.stderr) if part)
        log += f"\nError: no result after {args.limit} seconds"
    if args.logs is not None:
        (args.logs / f"{entry['name']}-{backend}.log").write_text(log)
    results = [line for line in log.splitlines() if line.startswith("RESULT ")]
    if results:
        checks = [line.partition("transmla: ")[2] for line in log.splitlines() if "transmla: the logits" in line]
        return row | {"check at start-up": (checks or ["none"])[0]} | json.loads(results[-1][len("RESULT ") :])
    errors = [line.strip() for line in log.splitlines() if "Error: " in line]
    return row | {"failed": (errors or log.splitlines()[-1:] or ["no output"])[-1][-600:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    first = parts.add_parser("reference", help="generate with transformers")
    first.add_argument("file", type=Path, help="JSON file to write, in the folder of the exports")
    first.add_argument("exports", nargs="+", help="names of the exports' folders")
    second = parts.add_parser("compare", help="generate with SGLang and compare")
    second.add_argument("file", type=Path, help="JSON file of the first part")
    second.add_argument("--backends", nargs="+", default=["fa3", "triton"], help="SGLang's attention backends")
    second.add_argument("--only", nargs="+", help="names of exports; default: all")
    second.add_argument("--parallel", type=int, default=6, help="servers at once")
    second.add_argument("--limit", type=float, default=120, help="seconds for each export")
    second.add_argument("--logs", type=Path, help="existing folder for the servers' logs")
    second.add_argument("--output", type=Path, default=RESULTS / "serve" / "sglang.json")
    second.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    third = parts.add_parser("one", help="one export, for `compare`")
    third.add_argument("file", type=Path)
    third.add_argument("name")
    third.add_argument("backend")
    third.add_argument("place", type=int)
    args = parser.parse_args()
    if args.part == "reference":
        entries = [{"name": name, "rows": reference(args.file.parent / name)} for name in args.exports]
        args.file.write_text(json.dumps(entries))
        return
    entries = json.loads(args.file.read_text())
    if args.part == "one":
        rows = next(entry["rows"] for entry in entries if entry["name"] == args.name)
        print("RESULT", json.dumps(serve(args.file.parent / args.name, rows, args.backend, args.place)), flush=True)
        return
    jobs = [(e, b) for b in args.backends for e in entries if args.only is None or e["name"] in args.only]
    rows = []
    with ThreadPoolExecutor(args.parallel) as pool:
        for row in pool.map(lambda job: in_process(args, *job[1], job[0]), enumerate(jobs)):
            rows.append(row)
            print(row, flush=True)
            write_result(args.output, rows, args.commit)


if __name__ == "__main__":
    main()
