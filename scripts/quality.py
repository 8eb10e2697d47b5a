"""Measure native exports by method and cache budget: the tables of docs/results.md.

    python scripts/quality.py MODEL --calibration valid.txt --text test.txt

For each row of ROWS, the script converts the model and measures seconds, peak memory, perplexity and KL to the source.
Perplexity and KL are measured on the test text and on a second text of another domain. Calibration and every choice of
a method use validation text. The test text is only measured.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, peak_bytes, reset_peak, write_result
from torch import Tensor

from transmla.convert.pipeline import convert
from transmla.core.methods.base import method_named
from transmla.evaluate.compare import evaluate_models
from transmla.recipe import Evaluation, parse_recipe
from transmla.reporter import Silent
from transmla.source.device import pick_device
from transmla.source.load import load_tokenizer
from transmla.source.open_source import open_source

# How the fit was found, and what was tried and not kept: docs/how-the-fit-was-found.md.


@dataclass(frozen=True)
class Row:
    """Settings of one conversion.

    Attributes:
        method, reconstruct, qk_rope_head_dim, kv_lora_rank, dtype: options of ``transmla convert``.
        freqfold: number of neighbouring frequencies to fold; None leaves the choice to the method.
        text: calibration text; None means --calibration.
    """

    method: str
    reconstruct: str
    qk_rope_head_dim: int
    kv_lora_rank: int
    freqfold: int | None = None
    dtype: str = "bfloat16"
    text: str | None = None


# Shapes (qk_rope_head_dim, kv_lora_rank) at 50, 33, 25 and 12.5 % of the source's 384 cached values. --cache-ratio
# chooses FITTED with reconstruction and CLOSED without.
FITTED = [(32, 160), (16, 112), (16, 80), (16, 32)]
CLOSED = [(64, 128), (32, 96), (32, 64), (16, 32)]
ROWS = [
    *(Row("calibrated", "full", *shape) for shape in FITTED),
    Row("calibrated", "full", 32, 160, text="self"),
    Row("calibrated", "full", 16, 80, text="self"),
    *(Row("calibrated", "off", *shape) for shape in CLOSED),
    Row("calibrated", "full", 32, 160, dtype="float32"),
    Row("calibrated", "full", 64, 128),
    Row("calibrated", "full", 32, 96),
    *(Row("calibrated", "fast", *shape) for shape in FITTED),
    *(Row("care", "off", *shape, freqfold=2 if shape[0] == 64 else 4) for shape in CLOSED[:3]),
    Row("mha2mla", "off", 64, 128, freqfold=2),
    # The published search chose these values of freqfold on test text, which favours the baseline.
    Row("transmla", "off", 64, 128, freqfold=2),
    Row("transmla", "off", 32, 160, freqfold=4),
    Row("transmla", "off", 32, 96, freqfold=4),
    Row("transmla", "off", 32, 64, freqfold=4),
    Row("calibrated", "fast", 32, 160, text="self"),
    Row("calibrated", "fast", 16, 80, text="self"),
]

# (sequences, length) of the calibration text of the published methods, as in TransMLA's code.
DRAWN = (128, 256)


def draw(text: Path, tokenizer: Any, seed: int) -> Tensor:
    """Draw calibration tokens [128, 256] as TransMLA's code does: paragraphs from random starts, none used twice."""
    sequences, length = DRAWN
    paragraphs = [line for line in text.read_text().split("\n") if line]
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    while len(rows) < sequences and paragraphs:
        start = end = int(torch.randint(len(paragraphs), (1,), generator=generator))
        tokens: list[int] = []
        while len(tokens) < length and end < len(paragraphs):
            tokens += tokenizer(("\n\n" if tokens else "") + paragraphs[end]).input_ids
            end += 1
        del paragraphs[start:end]
        if len(tokens) >= length:
            rows.append(tokens[:length])
    return torch.tensor(rows)


def measure(arguments: argparse.Namespace, row: Row, seed: int | None) -> dict[str, Any]:
    """Convert with the settings of ``row`` and evaluate the export.

    Args:
        arguments: the command line.
        row: settings of the conversion.
        seed: seed of calibration text drawn at random. None spreads the text over the file.
    """
    tokens = None if seed is None else draw(Path(arguments.calibration), load_tokenizer(Path(arguments.model)), seed)
    settings = {name: value for name, value in asdict(row).items() if name != "text"}
    text = row.text or arguments.calibration
    recipe = parse_recipe(
        {
            **settings,
            "source": arguments.model,
            "output": str(arguments.work / "export"),
            "device": arguments.device,
            "calibration": {"source": text, "sequences": arguments.sequences, "length": arguments.length},
        },
        "quality.py",
    )
    device = pick_device(arguments.device)
    # Warm up: importing the model's code and mapping its weights do not count as conversion time.
    open_source(recipe)
    reset_peak(device)
    began = time.perf_counter()
    folder = convert(recipe, calibration=tokens)
    seconds = time.perf_counter() - began
    peak = peak_bytes(device)
    result = {
        **asdict(row),
        "text": "self" if row.text else Path(text).name,
        "calibration": f"{arguments.sequences} x {arguments.length}" if seed is None else f"128 x 256, seed {seed}",
        "seconds": round(seconds, 1),
        "peak_mib": round(peak / 2**20),
    }
    for name, file in (("test", arguments.text), ("other", arguments.other)):
        measured = evaluate_models(
            str(folder),
            arguments.model,
            Evaluation(text=file, window=arguments.window, max_windows=arguments.windows),
            device=arguments.device,
            reporter=Silent(),
        )
        names = ("perplexity", "baseline_perplexity", "kl", "top1_agreement")
        result |= {f"{name}_{key}": round(measured["mean"][key], 4) for key in names}
    shutil.rmtree(folder)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="SmolLM2-135M-Instruct: folder, GGUF file or package:NAME/FILE")
    parser.add_argument("--calibration", required=True, help="text file to calibrate on: validation text")
    parser.add_argument("--text", required=True, help="text file to measure on: test text")
    parser.add_argument("--other", default="pydoc", help="second text to measure on, of another domain")
    parser.add_argument("--sequences", type=int, default=32, help="calibration sequences")
    parser.add_argument("--length", type=int, default=2048, help="tokens per calibration sequence")
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=[0, 1, 2], help="seeds of the calibration text of the published methods"
    )
    parser.add_argument("--window", type=int, default=2048, help="tokens per evaluation window")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of each text")
    parser.add_argument("--only", nargs="*", type=int, help="indices of the rows of ROWS to measure")
    parser.add_argument("--device", default="auto", help="device to run on: auto, cpu, cuda, …")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="scratch folder")
    parser.add_argument("--result", type=Path, default=RESULTS / "quality/all.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    rows = []
    for index, row in enumerate(ROWS):
        if arguments.only and index not in arguments.only:
            continue
        for seed in arguments.seeds if method_named(row.method).baseline else [None]:
            rows.append(measure(arguments, row, seed))
            print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
            write_result(arguments.result, rows, arguments.commit)


if __name__ == "__main__":
    main()
