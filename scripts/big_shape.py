"""Convert sources with the sizes of big models under a limit of memory, and measure time and peak memory by depth.

    python scripts/big_shape.py --shape 70b --layers 1 2 4 --sequences 8 --gigabytes 16
    python scripts/big_shape.py --plot docs/scale.png

Sources have random bfloat16 weights, written shard by shard, and random calibration tokens. Each conversion runs in its
own process, in closed form on the CPU, inside a memory cgroup. Without permission to make one, the limit is on the
process's data (RLIMIT_DATA). Rows are added to the result file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, write_result

# Widths of the sources: of Llama-3-70B, of a smaller Llama that reaches more layers in the same time, and of SmolLM2.
SHAPES: dict[str, dict[str, int]] = {
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "narrow": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}
ROPE = {"rope_type": "default", "rope_theta": 500000.0}
# Seconds between samples of the memory.
SAMPLING = 0.05
CGROUPS = Path("/sys/fs/cgroup/memory")


def write_source(folder: Path, shape: dict[str, int], layers: int) -> None:
    """Write a Llama with random weights, one shard in memory at a time."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(**shape, num_hidden_layers=layers, pad_token_id=0, rope_parameters=ROPE)
    config.dtype, config.architectures = "bfloat16", ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, size in shapes.items():
        parts = name.split(".")
        shards.setdefault(".".join(parts[:3]) if parts[1] == "layers" else name, {})[name] = size
    torch.manual_seed(0)
    index: dict[str, str] = {}
    for number, sizes in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.empty(size, dtype=torch.bfloat16) for name, size in sizes.items()}
        for name, tensor in tensors.items():
            tensor.fill_(1) if "norm" in name else tensor.normal_(std=0.02)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


class Sampler(threading.Thread):
    """Samples this process's memory: the largest sum, its anonymous part, and the line of code at the largest."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.resident = 0
        self.place, self.by_place = "", dict[str, int]()
        self._main = threading.main_thread().ident

    def run(self) -> None:
        while True:
            anonymous, mapped = _memory()
            self.resident = max(self.resident, anonymous + mapped)
            place = self._place()
            self.by_place[place] = max(self.by_place.get(place, 0), anonymous)
            if anonymous > self.anonymous:
                self.anonymous, self.place = anonymous, place
            time.sleep(SAMPLING)

    def _place(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None and "transmla" not in frame.f_code.co_filename:
            frame = frame.f_back
        return "" if frame is None else f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"


def _memory() -> tuple[int, int]:
    """Return the bytes of this process's resident anonymous and other memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, *others = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem"))
    return anonymous, sum(others)


def convert_here(job: dict[str, Any]) -> dict[str, Any]:
    """Convert in this process, and return seconds and peaks of memory."""
    from transmla.convert.pipeline import convert
    from transmla.convert.prepare import prepare
    from transmla.plan.estimate import memory_bytes
    from transmla.recipe import parse_recipe
    from transmla.reporter import Silent, Timed

    settings = {"source": job["source"], "output": job["output"], "device": "cpu", "reconstruct": job["reconstruct"]}
    recipe = parse_recipe(settings | {"heal": "off", "cache_ratio": 0.5}, "big_shape.py")
    tokens = torch.randint(0, job["vocabulary"], (job["sequences"], job["length"]))
    sampler, timed, began = Sampler(), Timed(Silent()), time.monotonic()
    sampler.start()
    prepared = prepare(recipe, sequences=len(tokens))
    plan = prepared.plan
    convert(recipe, reporter=timed, calibration=tokens, prepared=prepared)
    stages = {stage["name"]: stage for stage in timed.finish()}
    return {
        "estimate GB": round(memory_bytes(plan, tokens.numel(), prepared.fit) / 1e9, 2),
        "seconds": round(time.monotonic() - began, 1),
        "CPU seconds": round(time.process_time(), 1),
        "stages": {name: round(stage["seconds"], 1) for name, stage in stages.items()},
        "phases": {name: round(spent, 1) for name, spent in stages["converting layers"]["phases"].items()},
        "peak GB": round(sampler.resident / 1e9, 2),
        "anonymous GB": round(sampler.anonymous / 1e9, 2),
        "peak at": sampler.place,
        "largest at": {
            place: round(size / 1e9, 2) for place, size in sorted(sampler.by_place.items(), key=lambda p: -p[1])[:12]
        },
    }


@contextmanager
def limited(size: int) -> Iterator[tuple[str, Path | None]]:
    """Yield the name of the limit of memory in bytes, and the file that a process joins it by (None: an rlimit)."""
    group = CGROUPS / f"transmla-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(size))
    except OSError:
        yield "RLIMIT_DATA", None
        return
    try:
        yield "cgroup", group / "cgroup.procs"
    finally:
        group.rmdir()


def measure(arguments: argparse.Namespace, layers: int, scratch: Path) -> dict[str, Any]:
    """Write a source of ``layers`` layers, convert it in a limited process, and return its row."""
    shape = SHAPES[arguments.shape]
    source, output, report = scratch / "source", scratch / "export", scratch / "report.json"
    source.mkdir()
    write_source(source, shape, layers)
    job = {
        "source": str(source),
        "output": str(output),
        "report": str(report),
        "vocabulary": shape["vocab_size"],
        **{name: getattr(arguments, name) for name in ("sequences", "length", "reconstruct")},
    }
    size = round(arguments.gigabytes * 1e9)
    with limited(size) as (kind, joined):

        def enter() -> None:
            if joined is not None:
                joined.write_text(str(os.getpid()))
            else:
                resource.setrlimit(resource.RLIMIT_DATA, (size, size))

        command = [sys.executable, __file__, "--job", json.dumps(job)]
        done = subprocess.run(command, preexec_fn=enter, check=False)
    row = {
        "shape": arguments.shape,
        "layers": layers,
        "calibration": f"{arguments.sequences} x {arguments.length}",
        "reconstruct": arguments.reconstruct,
        "limit": f"{arguments.gigabytes:g} GB, {kind}",
        "source GB": round(sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e9, 2),
    }
    return row | (json.loads(report.read_text()) if done.returncode == 0 else {"failed": done.returncode})


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw time and peak memory against the number of layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    done = [row for row in rows if "failed" not in row]
    names = {(row["shape"], row["calibration"]) for row in done}
    for shape, calibration in sorted(names):
        chosen = [row for row in done if (row["shape"], row["calibration"]) == (shape, calibration)]
        chosen = sorted(chosen, key=lambda row: row["layers"])
        depths = [row["layers"] for row in chosen]
        label = f"{SHAPES[shape]['hidden_size']:,} wide, {calibration} tokens"
        axes[0].plot(depths, [row["seconds"] / 60 for row in chosen], "o-", label=label)
        axes[1].plot(depths, [row["anonymous GB"] for row in chosen], "o-", label=label)
    axes[0].set(xlabel="layers", ylabel="minutes", ylim=(0, None), xlim=(0, None))
    axes[1].set(xlabel="layers", ylabel="peak memory, GB", ylim=(0, None), xlim=(0, None))
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="70b", help="widths of the sources")
    parser.add_argument("--layers", type=int, nargs="*", default=[], help="numbers of layers, one conversion each")
    parser.add_argument("--sequences", type=int, default=64, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--reconstruct", default="off", help="as for `transmla convert`")
    parser.add_argument("--gigabytes", type=float, default=16, help="limit of memory in 10^9 bytes")
    parser.add_argument("--work", type=Path, help="folder for source and export; default: a temporary folder")
    parser.add_argument("--result", type=Path, default=RESULTS / "scale/depth.json", help="JSON file to add rows to")
    parser.add_argument("--plot", type=Path, help="draw the rows of all files beside the result file into this file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job = json.loads(arguments.job)
        Path(job["report"]).write_text(json.dumps(convert_here(job)))
        return
    rows = json.loads(arguments.result.read_text())["rows"] if arguments.result.is_file() else []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
            rows.append(measure(arguments, layers, Path(scratch)))
        print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        write_result(arguments.result, rows, None)
    if arguments.plot:
        files = sorted(arguments.result.parent.glob("*.json"))
        draw([row for file in files for row in json.loads(file.read_text())["rows"]], arguments.plot)


if __name__ == "__main__":
    main()
