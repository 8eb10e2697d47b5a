"""Measure how long a conversion takes for each layer, by phase, and which kernels of a GPU take that time.

    python scripts/layer_speed.py qwen2.5-0.5b llama-3-8b --layers 4 --profile
    torchrun --nproc_per_node 2 scripts/layer_speed.py llama-3-8b --layers 4

Sources have the real sizes of a layer, random weights, a few layers and random calibration tokens. All defaults of
``transmla convert`` are kept. Texts, samples and healing are left out. Beside each measurement stands what
``transmla plan`` would say: the same estimates, with rates that are measured on this device. ``--profile`` adds the
kernels with the largest sums of time; a profiled run is slower on the CPU.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode_bench import MODELS
from provenance import RESULTS, peak_bytes, reset_peak, write_result
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from transmla.convert.pipeline import convert
from transmla.convert.prepare import prepare, process_bytes, summarise
from transmla.export.manifest import Manifest
from transmla.ranks import Ranks, launched, leave
from transmla.recipe import parse_recipe
from transmla.reporter import Silent, Timed

ROPE = {"rope_type": "default", "rope_theta": 500000.0}
# Kernels that are listed, and characters of their names.
LISTED, NAME = 24, 120


def write_source(name: str, layers: int, vocabulary: int, folder: Path, device: str) -> Path:
    """Write a source with random weights, and return its folder.

    Args:
        name: key of ``decode_bench.MODELS``.
        layers: number of layers.
        vocabulary: number of tokens.
        folder: scratch folder.
        device: where to draw the weights.
    """
    family, settings = MODELS[name]
    sizes = settings | {"num_hidden_layers": layers, "vocab_size": vocabulary, "pad_token_id": 0}
    # Gemma 3 has two kinds of rotary embeddings, and defaults for both.
    rope = {} if family == "gemma3_text" else {"rope_parameters": ROPE}
    config = AutoConfig.for_model(family, **sizes, **rope)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    source = folder / name
    model.save_pretrained(source)
    # A conversion needs a tokenizer, although it is given tokens.
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(source)
    return source


def measure(source: Path, arguments: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Convert once, and return seconds by phase and layer, the peak of the memory, and the kernels.

    Args:
        source: folder of the source.
        arguments: the command line.
        ranks: the processes that convert together; only the first gets a result.
    """
    output = source.with_name(source.name + "-mla")
    ranks.on_first(lambda: shutil.rmtree(output, ignore_errors=True))
    settings = {"source": str(source), "output": str(output), "device": arguments.device, "calibration": {}}
    settings |= {"cache_ratio": arguments.cache_ratio, "reconstruct": arguments.reconstruct, "heal": "off"}
    for field in ("sequences", "length"):
        if (given := getattr(arguments, field)) is not None:
            settings["calibration"][field] = given
    recipe = parse_recipe(settings, "layer_speed.py")
    prepared = prepare(recipe)
    amount = prepared.recipe.calibration.sequences or 1, prepared.recipe.calibration.length or 1
    torch.manual_seed(0)
    tokens, estimated = torch.randint(0, arguments.vocabulary, amount), summarise(prepared)
    timed, device = Timed(Silent()), torch.device(arguments.device)
    reset_peak(device)
    kernels: list[dict[str, Any]] = []
    if arguments.profile:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            convert(recipe, reporter=timed, calibration=tokens)
        found = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
        kernels = [
            {"kernel": e.key[:NAME], "calls": e.count, "seconds": round(e.self_device_time_total / 1e6, 2)}
            for e in found[:LISTED]
        ]
    else:
        convert(recipe, reporter=timed, calibration=tokens)
    if not ranks.first:
        return {}
    stages = {stage["name"]: stage for stage in timed.finish()}
    fits = sum(layer.get("fit_attempts", 0) for layer in Manifest.read(output).layers)
    phases = stages["converting layers"]["phases"]
    return {
        "processes": ranks.size,
        "calibration": f"{tokens.shape[0]} x {tokens.shape[1]}",
        "seconds by layer": {name: round(seconds / arguments.layers, 2) for name, seconds in phases.items()},
        "seconds a layer": round(stages["converting layers"]["seconds"] / arguments.layers, 2),
        # A fit that does not help is run again; with random weights, this happens more often than with real ones.
        "fits a layer": fits / arguments.layers,
        "estimated seconds a layer": round(estimated["seconds"] / arguments.layers, 2),
        "peak GiB": round(peak_bytes(device) / 2**30, 1),
        # On a GPU without the hidden states between layers, which go to the computer's memory if need be.
        "estimated GiB": round(process_bytes(prepared) / 2**30, 1),
        "kernels": kernels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS, help="sizes of the sources")
    parser.add_argument("--layers", type=int, default=4, help="layers of a source")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens of a source")
    parser.add_argument("--cache-ratio", type=float, default=0.5, help="share of the cache to keep")
    parser.add_argument("--reconstruct", default="auto", help="as for `transmla convert`")
    parser.add_argument("--sequences", type=int, help="calibration sequences; default: as for `transmla convert`")
    parser.add_argument("--length", type=int, help="tokens per sequence; default: as for `transmla convert`")
    parser.add_argument("--profile", action="store_true", help="list the kernels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    parser.add_argument("--result", type=Path, default=RESULTS / "layer_speed/layers.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    ranks = launched(arguments.device)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = ranks.on_first(lambda: Path(scratch))
        for name in arguments.models:
            write = partial(write_source, name, arguments.layers, arguments.vocabulary, folder, arguments.device)
            measured = measure(ranks.on_first(write), arguments, ranks)
            rows.append({"model": name, "layers": arguments.layers, **measured})
            if ranks.first:
                print(*(f"{key}={value}" for key, value in rows[-1].items() if key != "kernels"), flush=True)
                for row in rows[-1]["kernels"]:
                    print(f"{row['seconds']:8.2f} s {row['calls']:8} {row['kernel']}", flush=True)
                write_result(arguments.result, rows, arguments.commit)
    leave()


if __name__ == "__main__":
    main()
