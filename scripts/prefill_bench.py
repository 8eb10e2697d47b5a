"""Measure how long sources and their conversions take to read a prompt. All weights are random.

    python scripts/prefill_bench.py llama-3-8b qwen3-8b --lengths 1024 4096 16384 32768
    python scripts/prefill_bench.py tiny --shape 32+16 --layers 2 --lengths 64 --device cpu

Models have the real sizes of a layer and a few layers. Every model has a process of its own, so that its first call
selects and loads all its kernels. The source attends by each of --attention that transformers can use here.
"sdpa" leaves the kernel to PyTorch; "sdpa:cudnn" and "sdpa:flash" force one, as a user could.

Measured for each model and length, one sequence:
    first s          first call with a prompt of this length; the shortest length comes first
    s                median of the calls after it
    slower %         the conversion: how much longer its median is than the fastest source's
    than sdpa %      the conversion: the same, beside the source whose kernel PyTorch chose
    compiling s      first call less the median
    peak MiB         largest memory of a GPU during the calls, with weights
    served           kernel of PyTorch that attended, in one more call under a profiler
    ... ms           in that call: GPU milliseconds of attention, of matrix products, and of all else
    kernels          in that call: kernels of the GPU

``--kernels`` measures the attention of one layer alone: with the source's heads, and with the conversion's, whose
queries and keys are wider than values. Fused kernels of PyTorch need one width ("padded"), except cuDNN's. The forms
"one buffer" and "padded view" have the memory in which ``transmla.load`` writes keys and values. "expansion" computes
keys and values from latents: as ``transmla.load`` does, and by one product, a join and padding.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from decode_bench import MODELS, build
from provenance import RESULTS, peak_bytes, reset_peak, write_result
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from transmla.kernels.rows import Rows
from transmla.runtime.expansion import expand

KERNELS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
# Kernels that --attention may force for SDPA.
FORCED = {"sdpa:cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa:flash": SDPBackend.FLASH_ATTENTION}
# Parts of a call, by words in the names of their kernels; the first one that fits counts. cuDNN's and PyTorch's kernels
# of attention also contain words of matrix products.
PARTS = {"attention ms": "fmha|flash|sdpa", "products ms": "gemm|gemv|nvjet|cutlass|xmma|cublas", "other ms": ""}


def seconds(call: Any, device: torch.device) -> float:
    """Return the seconds that ``call()`` takes, on the GPU if ``device`` is one."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def measure(model: Any, lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    """Return one row for each of ``lengths``: the first call and the median of ``repeats`` further ones."""
    rows = []
    for length in sorted(lengths):
        tokens = torch.randint(model.config.vocab_size, (1, length), device=model.device)

        def call(tokens: Tensor = tokens) -> None:
            model(tokens, use_cache=True, logits_to_keep=1)

        if model.device.type == "cuda":
            reset_peak(model.device)
        first, *others = [seconds(call, model.device) for _ in range(repeats + 1)]
        median = statistics.median(others)
        row = {"length": length, "first s": round(first, 4), "s": round(median, 5)}
        rows.append(row | {"compiling s": round(first - median, 4)} | parts(call, model.device))
        if model.device.type == "cuda":
            rows[-1]["peak MiB"] = round(peak_bytes(model.device) / 2**20)
    return rows


def parts(call: Any, device: torch.device) -> dict[str, Any]:
    """Return which kernel of PyTorch attended in ``call()``, and how long its parts took on a GPU."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiled:
        seconds(call, device)
    events = profiled.events()
    named = (re.match(r"aten::_scaled_dot_product_(?:attention_)?([a-z]+)", event.name) for event in events)
    row: dict[str, Any] = {"served": ", ".join(sorted({match[1] for match in named if match} - {"attention", "fused"}))}
    if gpu:
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith(("Mem", "aten::"))]
        times: Counter[str] = Counter()
        for event in kernels:
            part = next(part for part, words in PARTS.items() if re.search(words, event.name, re.IGNORECASE))
            times[part] += event.time_range.elapsed_us()
        row |= {part: round(times[part] / 1e3, 3) for part in PARTS} | {"kernels": len(kernels)}
    return row


@torch.no_grad()
def attention_alone(name: str, shape: str, length: int, device: torch.device) -> list[dict[str, Any]]:
    """Return the seconds of one layer's causal attention, for each kernel and form of heads."""
    settings = MODELS[name][1]
    heads, width = settings["num_attention_heads"], settings.get("head_dim")
    width = width or settings["hidden_size"] // heads
    wide, dtype, rows = width + int(shape.split("+")[1]), torch.bfloat16, []
    buffer = torch.randn(1, length, heads, wide + width, device=device, dtype=dtype).transpose(1, 2)
    for form, shared, d_qk, d_v in (
        ("source", settings["num_key_value_heads"], width, width),
        ("padded", heads, wide, wide),
        ("conversion", heads, wide, width),
        ("padded view", heads, wide, wide),
        ("one buffer", heads, wide, width),
    ):
        query, key, value = (
            torch.randn(1, count, length, d, device=device, dtype=dtype)
            for count, d in ((heads, d_qk), (shared, d_qk), (shared, width))
        )
        value = pad(value, (0, d_v - width))
        if form in ("padded view", "one buffer"):
            key, value = buffer[..., :wide], buffer[..., -d_v:]
        for kernel in KERNELS:

            def call(q: Tensor = query, k: Tensor = key, v: Tensor = value) -> Tensor:
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])

            row = {"model": name, "form": form, "kernel": kernel.name, "length": length}
            try:
                with sdpa_kernel(kernel):
                    times = [seconds(call, device) for _ in range(6)]
                rows.append(row | {"first s": round(times[0], 4), "ms": round(statistics.median(times[1:]) * 1e3, 3)})
            except RuntimeError as error:
                rows.append(row | {"refused": str(error).splitlines()[0]})
    return rows


@torch.no_grad()
def expansion_alone(name: str, shape: str, length: int, device: torch.device) -> list[dict[str, Any]]:
    """Return the seconds in which one layer computes keys and values from latents, in two ways."""
    settings, (rank, d_r) = MODELS[name][1], (int(part) for part in shape.split("+"))
    heads = settings["num_attention_heads"]
    width = settings.get("head_dim") or settings["hidden_size"] // heads
    made: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    projection = torch.nn.Linear(rank, heads * 2 * width, bias=False, **made)
    layer = SimpleNamespace(kv_b_proj=projection, qk_nope_head_dim=width, qk_rope_head_dim=d_r, v_head_dim=width)
    rows = Rows(torch.randn(1, length, rank, **made), torch.randn(1, length, d_r, **made))

    def joined() -> Any:
        nope, value = projection(rows.kv_c).unflatten(-1, (heads, -1)).transpose(1, 2).chunk(2, -1)
        return torch.cat([nope, rows.k_pe[:, None].expand(-1, heads, -1, -1)], -1), pad(value, (0, d_r))

    found = []
    for kernel, call in (("one buffer", lambda: expand(layer, rows)), ("joined and padded", joined)):
        times = [seconds(call, device) for _ in range(6)]
        row = {"model": name, "form": "expansion", "kernel": kernel, "length": length, "first s": round(times[0], 4)}
        found.append(row | {"ms": round(statistics.median(times[1:]) * 1e3, 3)})
    return found


def run_one(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the model of ``arguments`` in this process."""
    source, device = arguments.role == "source", torch.device(arguments.device)
    (name,) = arguments.models
    # The first call of any model in a process also starts the GPU's libraries.
    square = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
    seconds(lambda: square @ square, device)
    role = "dynamic" if source else "growing"
    model = build(name, role, arguments.shape, arguments.backend, arguments.device, arguments.layers)
    way = arguments.attention[0] if source else "latent_attention"
    if source:
        model.set_attn_implementation(way.split(":")[0])
    fields = {"model": name, "layers": arguments.layers, "role": arguments.role, "attention": way}
    with sdpa_kernel(FORCED[way]) if way in FORCED else nullcontext():
        return [fields | row for row in measure(model, arguments.lengths, arguments.repeats)]


def run_apart(role: str, name: str, attention: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one model in a process of its own; if the process fails, say why and return no rows."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        options = {"--role": role, "--attention": attention, "--result": str(result)}
        kept = ("shape", "layers", "repeats", "backend", "device", "commit")
        options |= {f"--{option}": str(getattr(arguments, option)) for option in kept if getattr(arguments, option)}
        command = [sys.executable, __file__, name, *(part for pair in options.items() for part in pair)]
        done = subprocess.run(
            [*command, "--lengths", *map(str, arguments.lengths)], check=False, capture_output=True, text=True
        )
        if done.returncode:
            print(f"{name} {role} {attention}: {done.stderr.strip().splitlines()[-1]}", flush=True)
            return []
        rows: list[dict[str, Any]] = json.loads(result.read_text())["rows"]
        return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Add ``slower %`` and ``than sdpa %`` to the rows of conversions whose source was measured."""
    for row in rows:
        sources = [
            other
            for other in rows
            if other.get("role") == "source" and (other["model"], other["length"]) == (row["model"], row["length"])
        ]
        plain = [other["s"] for other in sources if other["attention"] == "sdpa"]
        for column, rivals in (("slower %", [other["s"] for other in sources]), ("than sdpa %", plain)):
            if row.get("role") == "export" and rivals:
                row[column] = round((row["s"] / min(rivals) - 1) * 100, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS, help="configs of the models before conversion")
    parser.add_argument("--shape", default="512+64", help="kv_lora_rank+qk_rope_head_dim of the converted models")
    parser.add_argument("--layers", type=int, default=4, help="layers of every model")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384, 32768], help="tokens of prompts")
    parser.add_argument("--repeats", type=int, default=5, help="calls after the first one")
    parser.add_argument("--attention", nargs="+", default=["sdpa", *FORCED, "flash_attention_2"], help="of sources")
    parser.add_argument("--kernels", action="store_true", help="also measure attention and expansion alone")
    parser.add_argument("--backend", default="auto", help="decode kernel of the conversions")
    parser.add_argument("--role", choices=["source", "export"], help="measure one model in this process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    parser.add_argument("--result", type=Path, default=RESULTS / "prefill_bench/result.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = [] if arguments.role is None else run_one(arguments)
    for name in arguments.models if arguments.role is None else []:
        for role, way in (*(("source", way) for way in arguments.attention), ("export", "latent_attention")):
            rows += run_apart(role, name, way, arguments)
        if arguments.kernels:
            device = torch.device(arguments.device)
            for alone in (attention_alone, expansion_alone):
                rows += [row for n in arguments.lengths for row in alone(name, arguments.shape, n, device)]
        compare(rows)
    for row in rows if arguments.role is None else []:
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    write_result(arguments.result, rows, arguments.commit)


if __name__ == "__main__":
    main()
