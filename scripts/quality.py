"""Perplexity of native exports by method and cache budget: the quality table of the README.

    python scripts/quality.py MODEL --calibration valid.txt --text test.txt

Calibration and every choice of a method rest on validation text; the test text is only measured.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, write_result
from torch import Tensor

from transmla.after import evaluate_models
from transmla.pipeline import convert
from transmla.progress import Silent
from transmla.recipe import Evaluation, parse_recipe
from transmla.source import load_tokenizer

# (method, qk_rope_head_dim, kv_lora_rank, freqfold, export dtype); None leaves the method its own choice.
# The baseline's freqfold is the published search's, made on test text: its best shot.
ROWS = [
    ("transmla", 64, 128, 2, "bfloat16"),
    ("transmla", 32, 160, 4, "bfloat16"),
    ("transmla", 32, 96, 4, "bfloat16"),
    ("transmla", 32, 64, 4, "bfloat16"),
    ("calibrated", 64, 128, None, "bfloat16"),
    ("calibrated", 64, 128, None, "float32"),
    ("calibrated", 32, 160, None, "bfloat16"),
    ("calibrated", 32, 160, None, "float32"),
    ("calibrated", 32, 96, None, "bfloat16"),
    ("calibrated", 32, 64, None, "bfloat16"),
    ("calibrated", 32, 64, None, "float32"),
    ("calibrated", 16, 32, None, "bfloat16"),
]


# TransMLA's own calibration: sequences and length, drawn at random paragraphs.
DRAWN = (128, 256)


def draw(text: Path, tokenizer: Any, seed: int) -> Tensor:
    """Calibration tokens [128, 256] as TransMLA draws them: runs of paragraphs from random starts, none reused."""
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


def measure(
    arguments: argparse.Namespace, row: tuple[str, int, int, int | None, str], seed: int | None
) -> dict[str, Any]:
    """Convert by one row of the table and evaluate the export; a ``seed`` draws the calibration at random."""
    method, rope, rank, fold, dtype = row
    tokens = None if seed is None else draw(Path(arguments.calibration), load_tokenizer(Path(arguments.model)), seed)
    recipe = parse_recipe(
        {
            "source": arguments.model,
            "output": str(arguments.work / f"{method}-{rope}-{rank}-{dtype}"),
            "method": method,
            "qk_rope_head_dim": rope,
            "kv_lora_rank": rank,
            "freqfold": fold,
            "dtype": dtype,
            "device": arguments.device,
            "calibration": {"source": arguments.calibration, "sequences": 64, "length": 512},
        },
        "quality.py",
    )
    began = time.perf_counter()
    folder = convert(recipe, calibration=tokens)
    seconds = time.perf_counter() - began
    settings = Evaluation(
        text=arguments.text,
        split=None,
        column=None,
        window=arguments.window,
        max_windows=arguments.windows,
        stride=None,
    )
    result = evaluate_models(str(folder), arguments.model, settings, device=arguments.device, reporter=Silent())
    shutil.rmtree(folder)
    kept = ("perplexity", "baseline_perplexity", "kl", "top1_agreement")
    return {
        "method": method,
        "qk_rope_head_dim": rope,
        "kv_lora_rank": rank,
        "freqfold": fold,
        "dtype": dtype,
        "calibration": "first 64 x 512 tokens" if seed is None else f"random 128 x 256 tokens, seed {seed}",
        "seconds": round(seconds, 1),
        **{key: result[key] for key in kept},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="SmolLM2-135M-Instruct: folder, GGUF file or package:NAME/FILE")
    parser.add_argument("--calibration", required=True, help="validation text")
    parser.add_argument("--text", required=True, help="test text")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="draws of the baseline's calibration")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--only", nargs="*", type=int, help="rows of the table to measure, by number")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="scratch folder")
    parser.add_argument("--result", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--commit", help="commit to record where git has no history")
    arguments = parser.parse_args()
    rows = []
    for index, row in enumerate(ROWS):
        if arguments.only and index not in arguments.only:
            continue
        for seed in arguments.seeds if row[0] == "transmla" else [None]:
            rows.append(measure(arguments, row, seed))
            print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
            write_result(arguments.result, rows, arguments.commit)


if __name__ == "__main__":
    main()
