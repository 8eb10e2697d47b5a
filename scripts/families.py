"""Conversions of small trained models of families that no checkpoint can be had of: the methods keep their order.

    python scripts/train_small.py qwen3 small-qwen3
    python scripts/families.py small-qwen3

Each is converted to the own format by TransMLA's published method, by the closed form, and with every layer fitted;
calibrated on `pydoc`'s train split, measured on its test split.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from provenance import RESULTS, write_result

from transmla.after import evaluate_models
from transmla.pipeline import convert
from transmla.progress import Silent
from transmla.recipe import Evaluation, parse_recipe

# Method and reconstruction, from the baseline to the default.
WAYS = (("transmla", "off"), ("calibrated", "off"), ("calibrated", "fast"), ("calibrated", "full"))


def measure(model: Path, budget: float, method: str, effort: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and KL of one conversion."""
    output = arguments.work / f"{model.name}-{budget:.3f}-{method}-{effort}"
    for left in (output, output.with_name(output.name + ".partial")):
        shutil.rmtree(left, ignore_errors=True)
    calibration = {"source": "pydoc", "split": "train", "sequences": arguments.sequences, "length": 256}
    named = {"source": str(model), "output": str(output), "format": "transmla", "device": arguments.device}
    chosen = {"cache_ratio": budget, "method": method, "reconstruct": effort, "calibration": calibration}
    convert(parse_recipe(named | chosen, "families.py"))
    settings = Evaluation(text="pydoc", window=256, max_windows=64)
    found = evaluate_models(str(output), str(model), settings, device=arguments.device, reporter=Silent())
    row = {"model": model.name, "budget": budget, "method": method, "reconstruct": effort}
    return row | {name: round(found[name], 4) for name in ("baseline_perplexity", "perplexity", "kl")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="of scripts/train_small.py")
    parser.add_argument("--budgets", nargs="*", type=float, default=(0.5, 0.25))
    parser.add_argument("--sequences", type=int, default=64, help="of 256 tokens, to convert with")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=Path("families-work"))
    parser.add_argument("--result", type=Path, default=RESULTS / "families.json")
    parser.add_argument("--commit", help="commit to record where git has no history")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        for budget in arguments.budgets:
            for method, effort in WAYS:
                rows.append(measure(model, budget, method, effort, arguments))
                row = rows[-1]
                print(
                    f"{row['model']}, {budget:.0%}, {method}, {effort}: "
                    f"{row['baseline_perplexity']:.2f} -> {row['perplexity']:.2f}, KL {row['kl']:.4f}",
                    flush=True,
                )
                write_result(arguments.result, rows, arguments.commit)


if __name__ == "__main__":
    main()
