"""Measure one model for throughput.py, in a process of its own: python scripts/throughput_run.py JOB.json ROWS.jsonl

The job names a folder with a config, a backend and context lengths N. One JSON line per N is appended to the second
file as soon as it is measured. All weights are random.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

# Prompts of this many tokens together measure the speed of prefill.
PREFILL_TOKENS = 65536
# Prompts consist of the ids below this number, which every vocabulary has.
TOKEN_IDS = 96


def measured_context(tokens: int) -> int:
    """Return the context length at which decoding is timed: the mean of a run from N to 2 N tokens."""
    return tokens * 3 // 2


def row(job: dict[str, Any], tokens: int, batch: int, prefill: float, step: float) -> dict[str, Any]:
    """Return one row of the result.

    Args:
        job: the job.
        tokens: context length N.
        batch: sequences decoded together.
        prefill: prompt tokens per second.
        step: seconds of a decoding step of the whole batch.
    """
    seconds = batch * tokens / prefill + tokens * step
    return {
        **{key: job[key] for key in ("model", "role", "shape", "backend", "mode")},
        "N": tokens,
        "batch": batch,
        "weights GB": round(job["weight_bytes"] / 1e9, 2),
        "cache GB": round(job["cache_bytes"] / 1e9, 2),
        "cache bytes a token": job["token_bytes"],
        "prefill tokens/s": round(prefill, 1),
        "ms a step": round(step * 1e3, 3),
        "decode tokens/s": round(batch / step, 1),
        "N-in N-out tokens/s": round(batch * tokens / seconds, 1),
    }


def vllm_options(job: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM``."""
    batches = sorted({point["batch"] for point in job["points"]})
    options: dict[str, Any] = {
        "model": job["folder"],
        "load_format": "dummy",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": 2 * max(point["N"] for point in job["points"]),
        "max_num_seqs": max(batches),
        "max_num_batched_tokens": job["batched_tokens"],
        "kv_cache_memory_bytes": job["cache_bytes"],
        # With explicit bytes of the cache, vLLM only checks at its start that this share of the memory is free.
        "gpu_memory_utilization": 0.5,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    if job["mode"] == "graphs":
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": batches}
        return options | {"compilation_config": graphs}
    return options | {"enforce_eager": job["mode"] == "eager"}


def run_vllm(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure a model in vLLM; yield a row for each context length."""
    import vllm

    began = time.perf_counter()
    llm = vllm.LLM(**vllm_options(job))
    started = time.perf_counter() - began
    engine = llm.llm_engine
    cache = engine.vllm_config.cache_config
    # vLLM keeps one block for itself.
    capacity = (cache.num_gpu_blocks - 1) * cache.block_size
    names = map(str, count())
    for point in job["points"]:
        tokens = point["N"]
        rounded = -(-2 * tokens // cache.block_size) * cache.block_size
        batch = min(point["batch"], capacity // rounded)
        prompts = max(1, PREFILL_TOKENS // tokens)
        drain(engine, names, min(2, prompts), tokens, 1)  # warms up
        seconds = drain(engine, names, prompts, tokens, 1)[-1][0]
        prefill = prompts * tokens / seconds
        context = measured_context(tokens)
        # Sequences that are already decoding take their share of the tokens of a step.
        steps = -(-batch * context // (job["batched_tokens"] - batch)) + job["steps"]
        step = steady_step(drain(engine, names, batch, context - steps // 2, steps), batch)
        measured = row(job, tokens, batch, prefill, step)
        yield {
            **measured,
            "cache tokens": capacity,
            "GPU GB in use": used_gigabytes(),
            "start s": round(started, 1),
            "vllm": vllm.__version__,
            "runner": "V2" if engine.vllm_config.use_v2_model_runner else "V1",
        }


def drain(engine: Any, names: Iterator[str], batch: int, prompt: int, outputs: int) -> list[tuple[float, int]]:
    """Run ``batch`` requests to their end.

    Args:
        engine: vLLM's engine.
        names: names for requests.
        batch: number of requests.
        prompt: tokens of each prompt.
        outputs: tokens to generate for each.

    Returns:
        For each step of the engine, seconds since the requests were sent, and the number of tokens generated.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0, max_tokens=outputs, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    began, stamps = time.perf_counter(), []
    for i in range(batch):
        ids = [(i + j) % TOKEN_IDS for j in range(prompt)]
        engine.add_request(next(names), {"prompt_token_ids": ids}, params)
    while engine.has_unfinished_requests():
        outs = engine.step()
        made = sum(len(out.outputs[0].token_ids) for out in outs)
        if made:
            stamps.append((time.perf_counter() - began, made))
    return stamps


def steady_step(stamps: list[tuple[float, int]], batch: int) -> float:
    """Return the mean seconds of the steps in which all sequences decode, without the first and the last of these."""
    full = [seconds for seconds, made in stamps if made == batch][1:-1]
    if len(full) < 2:
        raise RuntimeError(f"no steps in which all {batch} sequences decode: give more --steps")
    return (full[-1] - full[0]) / (len(full) - 1)


def used_gigabytes() -> float | None:
    """Return the memory in use on the first visible GPU, by nvidia-smi; None without one."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={first}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return round(int(subprocess.check_output(command, text=True)) * 2**20 / 1e9, 2)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def run_transformers(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure a model in transformers, compiled over a static cache on GPUs; yield a row for each context length."""
    import decode_bench  # registers the attention over the whole cache
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from transmla.evaluate.bench import measure, prefill_seconds
    from transmla.modeling.registration import register

    register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        config = AutoConfig.from_pretrained(job["folder"])
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if job["role"] == "export":
        decode_bench.accelerate(model, backend="auto")
    else:
        model.set_attn_implementation("whole_cache")
    for point in job["points"]:
        tokens, batch = point["N"], point["batch"]
        prefill = tokens / prefill_seconds(model, tokens)
        found = measure(model, batch, measured_context(tokens), job["steps"], tokens / prefill)
        measured = row(job, tokens, batch, prefill, found.step_seconds)
        yield measured | {"cache tokens": batch * 2 * tokens, "GPU GB in use": used_gigabytes()}


BACKENDS: dict[str, Callable[[dict[str, Any]], Iterator[dict[str, Any]]]] = {
    "vllm": run_vllm,
    "transformers": run_transformers,
}


def main() -> None:
    job, rows = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for measured in BACKENDS[job["backend"]](job):
        with rows.open("a") as file:
            file.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
