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

from provenance import RESULTS, write_result

from transmla.after import evaluate_models
from transmla.pipeline import convert
from transmla.progress import Silent
from transmla.recipe import Evaluation, parse_recipe

# (method, qk_rope_head_dim, kv_lora_rank, freqfold, export dtype); None leaves the method its own choice.
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


def measure(arguments: argparse.Namespace, row: tuple[str, int, int, int | None, str]) -> dict[str, Any]:
    """Convert by one row of the table and evaluate the export."""
    method, rope, rank, fold, dtype = row
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
            "calibration": {
                "source": arguments.calibration,
                "sequences": arguments.sequences,
                "length": arguments.length,
            },
        },
        "quality.py",
    )
    began = time.perf_counter()
    folder = convert(recipe)
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
        "seconds": round(seconds, 1),
        **{key: result[key] for key in kept},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="SmolLM2-135M-Instruct: folder, GGUF file or package:NAME/FILE")
    parser.add_argument("--calibration", required=True, help="validation text")
    parser.add_argument("--text", required=True, help="test text")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
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
        rows.append(measure(arguments, row))
        print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        write_result(arguments.result, rows, arguments.commit)


if __name__ == "__main__":
    main()
