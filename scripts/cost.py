"""Measure wall time and peak memory of a conversion on a CPU, and how memory grows with depth.

    python scripts/cost.py MODEL --calibration valid.txt

Each conversion runs in a separate process. Its peak memory is its largest resident set. TransMLA's figures were
measured with its published command line on the same model and amount of text (its commit cdd6f8e, one thread).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from provenance import RESULTS, write_result

# Measured once with the published code, which this script does not run.
PUBLISHED = {"what": "TransMLA cdd6f8e, 32 + 96, its own command line", "cpu_seconds": 170, "peak_mib": 4053}
# Numbers of layers of the synthetic models.
DEPTHS = (24, 96)


def synthetic(folder: Path, layers: int) -> Path:
    """Write a Llama with random weights to a subfolder of ``folder`` and return its path.

    Args:
        folder: scratch folder.
        layers: number of layers, 14 MB each in bfloat16.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    target = folder / f"synthetic-{layers}"
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    return target


def convert(source: Path, calibration: str, work: Path, *flags: str) -> dict[str, Any]:
    """Run ``transmla convert`` in closed form and return its wall time, CPU time and peak memory."""
    output = work / "export"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "transmla", "convert", str(source), "--output", str(output), "--device", "cpu"]
    command += ["--calibration", calibration, "--reconstruct", "off", *flags]
    # RUSAGE_CHILDREN reports the largest peak of all children, so each conversion gets a new parent process.
    probe = (
        "import resource, subprocess, sys, time; began = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL);"
        "usage = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)"
    )
    printed = subprocess.check_output([sys.executable, "-c", probe, *command], text=True)
    wall, cpu, peak = map(float, printed.split())
    size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 2**20
    shutil.rmtree(output)
    return {
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_mib": round(peak),
        "model_mib": round(size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="SmolLM2-135M-Instruct as a checkpoint folder")
    parser.add_argument("--calibration", required=True, help="text file to calibrate on: WikiText-2 validation")
    parser.add_argument("--work", type=Path, default=Path("out/cost"), help="scratch folder")
    parser.add_argument("--result", type=Path, default=RESULTS / "cost/smollm2.json", help="JSON file to write")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    shape = ("--qk-rope-head-dim", "32", "--kv-lora-rank", "96")
    rows = [PUBLISHED]
    for sequences, length in ((64, 512), (128, 256)):
        text = ("--calibration-sequences", str(sequences), "--calibration-length", str(length))
        measured = convert(arguments.model, arguments.calibration, arguments.work, *shape, *text)
        rows.append({"what": f"SmolLM2-135M, 32 + 96, {sequences} x {length} tokens", **measured})
        print(rows[-1], flush=True)
    for layers in DEPTHS:
        source = synthetic(arguments.work, layers)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(arguments.model / file, source / file)
        short_text = ("--calibration-sequences", "8", "--calibration-length", "256")
        measured = convert(source, arguments.calibration, arguments.work, "--cache-ratio", "0.5", *short_text)
        rows.append({"what": f"synthetic, {layers} layers of width 768", **measured})
        print(rows[-1], flush=True)
        shutil.rmtree(source)
    write_result(arguments.result, rows, None)


if __name__ == "__main__":
    main()
