"""Measure conversions of small trained models, for families without a real checkpoint at hand.

    python scripts/train_small.py qwen3 small-qwen3
    python scripts/families.py small-qwen3

Each model is converted to the transmla format in four ways: TransMLA's published method, the closed form, and the
closed form with the `fast` and the `full` fit. They are calibrated on the train split of `pydoc` and measured on its
test split. The `full` export is then healed on the train split and on text sampled from the source.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from healing import cleared
from provenance import RESULTS, write_result

from transmla.convert.pipeline import convert
from transmla.evaluate.compare import evaluate_models
from transmla.heal.run import heal
from transmla.heal.settings import Healing
from transmla.recipe import Evaluation, parse_recipe
from transmla.reporter import Silent

# Tokens per sequence, in calibration, healing and evaluation.
LENGTH = 256
# (--method, --reconstruct) of each conversion, from the baseline to the default on GPUs.
WAYS = (("transmla", "off"), ("calibrated", "off"), ("calibrated", "fast"), ("calibrated", "full"))


def converted(model: Path, budget: float, method: str, fit: str, arguments: argparse.Namespace) -> Path:
    """Convert ``model`` and return the export.

    Args:
        model: checkpoint folder.
        budget: share of the source's cache to keep.
        method: value of --method.
        fit: value of --reconstruct.
        arguments: the command line.
    """
    output = cleared(arguments.work / f"{model.name}-{budget:.3f}-{method}-{fit}")
    calibration = {"source": "pydoc", "split": "train", "sequences": arguments.sequences, "length": LENGTH}
    named = {"source": str(model), "output": str(output), "format": "transmla", "device": arguments.device}
    chosen = {"cache_ratio": budget, "method": method, "reconstruct": fit, "calibration": calibration}
    return convert(parse_recipe(named | chosen, "families.py"))


def healed(export: Path, model: Path, arguments: argparse.Namespace) -> Path:
    """Heal the attention of ``export``, with the source ``model`` as the teacher, and return the new export."""
    sizes = {"length": LENGTH, "batch": 16, "self_tokens": arguments.heal // 2, "max_tokens": arguments.heal}
    named = {
        "student": str(export),
        "teacher": str(model),
        "output": str(cleared(export.with_name(f"{export.name}-healed"))),
    }
    return heal(Healing.model_validate(named | sizes | {"data": ("pydoc", "self"), "held_out": 8}))


def measured(export: Path, model: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the perplexity of ``export`` and of its source ``model``, and the KL between the two."""
    settings = Evaluation(text="pydoc", window=LENGTH, max_windows=64)
    result = evaluate_models(str(export), str(model), settings, device=arguments.device, reporter=Silent())
    return {name: round(result["mean"][name], 4) for name in ("baseline_perplexity", "perplexity", "kl")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders written by scripts/train_small.py")
    parser.add_argument("--budgets", nargs="*", type=float, default=(0.5, 0.25), help="shares of the cache to keep")
    parser.add_argument("--sequences", type=int, default=64, help=f"calibration sequences of {LENGTH} tokens")
    parser.add_argument("--heal", type=int, default=1_000_000, help="tokens to heal on; 0 skips healing")
    parser.add_argument("--device", default="auto", help="device to run on: auto, cpu, cuda, …")
    parser.add_argument("--work", type=Path, default=Path("families-work"), help="scratch folder")
    parser.add_argument("--result", type=Path, default=RESULTS / "families/small.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        for budget in arguments.budgets:
            export = model
            for method, fit in (*WAYS, *([("healed", "full")] if arguments.heal else [])):
                if method == "healed":
                    export = healed(export, model, arguments)
                else:
                    export = converted(model, budget, method, fit, arguments)
                row = {"model": model.name, "budget": budget, "method": method, "reconstruct": fit}
                rows.append(row | measured(export, model, arguments))
                print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
                write_result(arguments.result, rows, arguments.commit)


if __name__ == "__main__":
    main()
