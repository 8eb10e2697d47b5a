"""What healing wins back: the table of the README.

    python scripts/healing.py MODEL --calibration valid.txt --text test.txt

Converts at every budget, heals, and measures perplexity on the test text and KL to the source there and on a second
text of another domain, before and after. Healed twice: towards the source alone, and with a share of cross-entropy,
which also learns the text itself. Every choice rests on validation text or on the source's own; the test text is only
measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from provenance import RESULTS, write_result

from transmla.convert.pipeline import convert
from transmla.evaluate.compare import evaluate_models
from transmla.heal.run import heal
from transmla.heal.settings import Healing
from transmla.recipe import Evaluation, parse_recipe
from transmla.reporter import Silent

BUDGETS = (0.5, 1 / 3, 0.25, 0.125)


def distances(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and KL to the source, on the test text and on one of another domain."""
    texts = {"test": Evaluation(text=arguments.text, max_windows=16), "pydoc": Evaluation(text="pydoc", max_windows=8)}
    found: dict[str, Any] = {}
    for name, settings in texts.items():
        result = evaluate_models(str(folder), arguments.model, settings, device=arguments.device, reporter=Silent())
        found |= {f"{name} perplexity": round(result["perplexity"], 3), f"{name} KL": round(result["kl"], 4)}
        found[f"{name} perplexity of the source"] = round(result["baseline_perplexity"], 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to convert and heal on, or `self`")
    parser.add_argument("--text", required=True, help="test text")
    parser.add_argument("--data", nargs="*", help="texts to heal on (default: the calibration text and self)")
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS)
    parser.add_argument("--cross-entropy", nargs="*", type=float, default=(0.0, 0.1), help="its share of the loss")
    parser.add_argument("--reconstruct", default="full")
    parser.add_argument("--sequences", type=int, default=32, help="sequences of 2,048 tokens to convert with")
    parser.add_argument("--settings", nargs="*", default=[], help="NAME=VALUE of a healing")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=Path("healing-work"))
    parser.add_argument("--result", type=Path, default=RESULTS / "healing.json")
    parser.add_argument("--commit", help="commit to record where git has no history")
    arguments = parser.parse_args()
    given = dict(part.split("=", 1) for part in arguments.settings)
    if "cross_entropy" in given:
        parser.error("cross_entropy is an option of its own: --cross-entropy")
    rows: list[dict[str, Any]] = []
    for budget in arguments.budgets:
        export = cleared(arguments.work / f"export-{budget:.3f}")
        named = {"source": arguments.model, "output": str(export), "reconstruct": arguments.reconstruct}
        calibration = {"source": arguments.calibration, "sequences": arguments.sequences, "length": 2048}
        chosen = {"cache_ratio": budget + 1e-4, "calibration": calibration, "device": arguments.device}
        convert(parse_recipe(named | chosen, "healing.py"))
        before = distances(export, arguments)
        for share in arguments.cross_entropy:
            healed = cleared(arguments.work / f"healed-{budget:.3f}-{share}")
            data = tuple(arguments.data or dict.fromkeys((arguments.calibration, "self")))
            asked = {"student": str(export), "teacher": arguments.model, "output": str(healed), "data": data}
            heal(Healing.model_validate(asked | {"cross_entropy": share} | given))
            told = json.loads((healed / "transmla.json").read_text())
            rows.append(
                {
                    "budget": round(budget, 4),
                    "shape": told["plan"]["shape"],
                    "cross_entropy": share,
                    "before": before,
                    "after": distances(healed, arguments),
                    "healing": told["healing"][-1],
                }
            )
            after = rows[-1]["after"]
            for name in ("test perplexity", "test KL", "pydoc KL"):
                print(f"{budget:.1%}, cross-entropy {share}, {name}: {before[name]} -> {after[name]}", flush=True)
            write_result(arguments.result, rows, arguments.commit)


def cleared(folder: Path) -> Path:
    """A path where nothing is any more."""
    for left in (folder, folder.with_name(folder.name + ".partial")):
        shutil.rmtree(left, ignore_errors=True)
    return folder


if __name__ == "__main__":
    main()
