"""Measure the throughput of a model and of its conversion at equal memory. All weights are random.

    python scripts/throughput.py llama-2-7b llama-3-8b --backend vllm --memory 40 --contexts 1024 2048 4096 8192 16384
    python scripts/throughput.py tiny --backend transformers --memory 0.01 --contexts 64 --shape 96+32

Source and conversion get the same memory: ``--memory`` GB for weights, cache and a reserve for everything else. What
the weights and the reserve leave is cache. The batch is the number of sequences of 2 N tokens that the cache holds.

Measured for each context length N:
    prefill tokens/s      prompts of N tokens, as many as the server packs into a step
    decode tokens/s       steps in which the whole batch decodes, at a mean context of 1.5 N tokens; that is the mean
                          of a run that reads N tokens and writes N
Derived:
    N-in N-out tokens/s   N tokens written per sequence, divided by the time of N steps and of the batch's prefill

Backends: ``vllm`` serves both models; the conversion is padded for vLLM. ``transformers`` compiles both over a static
cache, and the conversion runs under ``transmla.accelerate``. There the context is filled with random rows, and prefill
is timed for one sequence.

Every model runs in its own process. A process that fails or exceeds ``--limit`` leaves its finished rows; its log is
beside its config folder.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from decode_bench import MODELS
from provenance import RESULTS, write_result
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from transmla.errors import TransmlaError
from transmla.formats.base import format_named
from transmla.modeling.registration import register
from transmla.plan.make_plan import make_plan
from transmla.recipe import parse_recipe
from transmla.source.describe import describe

SCRIPT = Path(__file__).with_name("throughput_run.py")
ROPE = {"rope_type": "default", "rope_theta": 500000.0}
ROLES = ("source", "export")


def write_configs(name: str, args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the configs of a model and of its conversion; return what is known of both, by role.

    Args:
        name: key of ``decode_bench.MODELS``.
        args: options of the command line.
        folder: where to write one folder for each role.

    Raises:
        TransmlaError: if the conversion saves nothing.
    """
    family, settings = MODELS[name]
    longest = max(settings["max_position_embeddings"], 2 * max(args.contexts))
    settings = settings | {"max_position_embeddings": longest, "pad_token_id": 0}
    source = AutoConfig.for_model(family, **settings, rope_parameters=ROPE, dtype="bfloat16")
    recipe = {"source": name, "output": "none"}
    if args.shape is not None:
        recipe["kv_lora_rank"], recipe["qk_rope_head_dim"] = map(int, args.shape.split("+"))
    if args.backend == "vllm":
        recipe["pad_for"] = "vllm"
    spec = describe(source)
    plan = make_plan(spec, parse_recipe(recipe, "throughput.py"), "bfloat16")
    converted = format_named(plan.format).config(source, plan)
    written = source.to_dict() | {"architectures": [architecture(source)]}
    shape = f"{plan.shape.kv_lora_rank}+{plan.shape.qk_rope_head_dim}"
    values = {"source": spec.cache_values, "export": plan.shape.cache_values}
    jobs = {}
    for role, config in zip(ROLES, (written, converted), strict=True):
        (folder / role).mkdir(parents=True)
        (folder / role / "config.json").write_text(json.dumps(config, indent=2))
        jobs[role] = {
            "model": name,
            "role": role,
            "shape": "source" if role == "source" else f"{shape} {plan.format}",
            "folder": str(folder / role),
            "backend": args.backend,
            "mode": args.mode if args.backend == "vllm" else "static",
            "steps": args.steps,
            "batched_tokens": args.batched_tokens,
            "token_bytes": 2 * values[role] * spec.num_hidden_layers,
            "weight_bytes": weight_bytes(folder / role),
        }
    return jobs


def architecture(config: PretrainedConfig) -> str:
    """Return the name of transformers' causal language model for ``config``."""
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config)).__name__


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a model's weights in bfloat16; a tied head counts once."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return 2 * sum(parameter.numel() for parameter in model.parameters())


def fit(job: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the job with its cache's bytes, and with a batch for each context length.

    Raises:
        TransmlaError: if not one sequence fits.
    """
    cache = int((args.memory - args.reserve) * 1e9) - job["weight_bytes"]
    batches = {n: min(cache // (2 * n * job["token_bytes"]), args.batch_cap) for n in args.contexts}
    points = [{"N": n, "batch": batch} for n, batch in batches.items() if batch > 0]
    if not points:
        raise TransmlaError(
            f"{job['model']} ({job['role']}) has {cache / 1e9:.3f} GB for its cache", remedy="raise --memory"
        )
    return job | {"cache_bytes": cache, "points": points}


def run(job: dict[str, Any], limit: float) -> Iterator[dict[str, Any]]:
    """Run a job in its own process, for at most ``limit`` seconds; yield each row when it is measured."""
    name, folder = f"{job['model']} {job['role']}", Path(job["folder"])
    file, rows, log = folder / "job.json", folder / "rows.jsonl", folder / "log.txt"
    file.write_text(json.dumps(job))
    rows.write_text("")
    command = [sys.executable, str(SCRIPT), str(file), str(rows)]
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    ends, seen, running = time.monotonic() + limit, 0, True
    while running:
        time.sleep(0.5)
        running = child.poll() is None and time.monotonic() < ends
        for line in rows.read_text().splitlines()[seen:]:
            seen += 1
            yield json.loads(line)
    if child.poll() is None:
        print(f"{name}: ended after {limit:.0f} s, see {log}", flush=True)
    elif child.returncode:
        print("\n".join(log.read_text().splitlines()[-30:]), flush=True)
        print(f"{name}: failed, see {log}", flush=True)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # vLLM's own processes too
    child.wait()


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table that compares the conversions with their sources."""
    keys = ("batch", "decode tokens/s", "N-in N-out tokens/s")
    lines = [
        f"| model | N | {' | '.join(f'{k}: source, export, ratio' for k in keys)} |",
        "|---" * (2 + len(keys)) + "|",
    ]
    found = {(r["model"], r["N"], r["role"]): r for r in rows}
    for model, n, role in found:
        export = found.get((model, n, "export"))
        if role != "source" or export is None:
            continue
        source = found[model, n, role]
        cells = [f"{source[k]:,} → {export[k]:,} ({export[k] / source[k]:.1f} ×)" for k in keys]
        lines.append(f"| {model} | {n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS, help="configs of models before conversion")
    parser.add_argument("--backend", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--roles", nargs="+", default=ROLES, choices=ROLES)
    parser.add_argument("--shape", help="kv_lora_rank+qk_rope_head_dim of the conversion; default: half of the cache")
    parser.add_argument("--memory", type=float, default=40, help="GB for weights, cache and reserve (default: 40)")
    parser.add_argument("--reserve", type=float, default=3, help="GB for activations and CUDA graphs (default: 3)")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384], help="values of N")
    parser.add_argument("--batch-cap", type=int, default=2048, help="largest batch (default: 2048)")
    parser.add_argument("--batched-tokens", type=int, default=16384, help="tokens of one prefill step of vLLM")
    parser.add_argument("--steps", type=int, default=64, help="timed decode steps")
    parser.add_argument(
        "--mode",
        default="graphs",
        choices=["graphs", "default", "eager"],
        help="vLLM: CUDA graphs of decoding without torch.compile, which start fast; vLLM's defaults; or neither",
    )
    parser.add_argument("--limit", type=float, default=420, help="seconds for one model (default: 420)")
    parser.add_argument("--work", type=Path, help="folder for configs and logs; default: a temporary one, kept")
    parser.add_argument("--result", type=Path, help="JSON file; default: results/throughput/BACKEND.json")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    args = parser.parse_args()
    register()
    work = args.work or Path(tempfile.mkdtemp(prefix="throughput-"))
    result = args.result or RESULTS / "throughput" / f"{args.backend}.json"
    rows: list[dict[str, Any]] = []
    for name in args.models:
        try:
            jobs = write_configs(name, args, work / name)
            for role in args.roles:
                for row in run(fit(jobs[role], args), args.limit):
                    print(*(f"{key}={value}" for key, value in row.items()), flush=True)
                    rows.append(row)
                    write_result(result, rows, args.commit)
        except TransmlaError as error:
            print(f"{name}: {error}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
