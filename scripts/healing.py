"""Measure exports before and after healing: the table of docs/healing.md.

    python scripts/healing.py MODEL --calibration valid.txt --text test.txt

At every budget, the script converts the model, heals the export, and measures both. It reports perplexity and KL to
the source, on the test text and on `pydoc`, a text of another domain. Each export is healed twice: with the KL to the
source alone, and with a share of cross-entropy, which also trains on the text itself. Every choice was made on
validation text or on text sampled from the source. The test text is only measured.
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

# Shares of the source's cache to keep.
BUDGETS = (0.5, 1 / 3, 0.25, 0.125)


def distances(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return perplexity and KL to the source of the export in ``folder``, on the test text and on `pydoc`."""
    windows = dict(zip(("test", "pydoc"), arguments.windows, strict=True))
    texts = {
        name: Evaluation(text=text, max_windows=windows[name])
        for name, text in (("test", arguments.text), ("pydoc", "pydoc"))
    }
    values: dict[str, Any] = {}
    for name, settings in texts.items():
        found = evaluate_models(str(folder), arguments.model, settings, device=arguments.device, reporter=Silent())
        result = found["mean"]
        values |= {f"{name} perplexity": round(result["perplexity"], 3), f"{name} KL": round(result["kl"], 4)}
        values[f"{name} perplexity of the source"] = round(result["baseline_perplexity"], 3)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the source: checkpoint folder or Hub id")
    parser.add_argument("--calibration", required=True, help="text to calibrate and heal on, or `self`")
    parser.add_argument("--text", required=True, help="test text, only measured")
    parser.add_argument("--data", nargs="*", help="texts to heal on (default: the calibration text and self)")
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS, help="shares of the cache to keep")
    parser.add_argument(
        "--cross-entropy", nargs="*", type=float, default=(0.0, 0.1), help="shares of the loss, one run each"
    )
    parser.add_argument("--reconstruct", default="full", help="fit of the conversion: off, fast or full")
    parser.add_argument("--sequences", type=int, default=32, help="calibration sequences of 2,048 tokens")
    parser.add_argument(
        "--windows", nargs=2, type=int, default=(16, 8), help="windows of the test text and of pydoc to measure on"
    )
    parser.add_argument("--settings", nargs="*", default=[], help="NAME=VALUE, settings of transmla heal")
    parser.add_argument("--device", default="auto", help="device to run on: auto, cpu, cuda, …")
    parser.add_argument("--work", type=Path, default=Path("healing-work"), help="scratch folder")
    parser.add_argument("--result", type=Path, default=RESULTS / "healing/batch-32.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    given = dict(part.split("=", 1) for part in arguments.settings)
    if "cross_entropy" in given:
        parser.error("--settings cross_entropy: use the option --cross-entropy")
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
            manifest = json.loads((healed / "transmla.json").read_text())
            rows.append(
                {
                    "budget": round(budget, 4),
                    "shape": manifest["plan"]["shape"],
                    "cross_entropy": share,
                    "before": before,
                    "after": distances(healed, arguments),
                    "healing": manifest["healing"][-1],
                }
            )
            after = rows[-1]["after"]
            for name in ("test perplexity", "test KL", "pydoc KL"):
                print(f"{budget:.1%}, cross-entropy {share}, {name}: {before[name]} -> {after[name]}", flush=True)
            write_result(arguments.result, rows, arguments.commit)


def cleared(folder: Path) -> Path:
    """Delete ``folder`` and its unfinished ``.partial`` folder, and return the path."""
    for path in (folder, folder.with_name(folder.name + ".partial")):
        shutil.rmtree(path, ignore_errors=True)
    return folder


if __name__ == "__main__":
    main()
