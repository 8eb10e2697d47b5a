"""Measure what `transmla convert` gives with its defaults: the table of docs/results.md.

    python scripts/defaults.py MODEL --name NAME --text wikitext:test.txt --text quotes:quotes.txt

Every option of the conversion keeps its default but the cache ratio. The script reports time, perplexity and KL to the
source on each text: the given ones, which calibration must never see, and the test splits of `pydoc` and `stdlib`. With
`--training-free`, it also converts without healing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from provenance import RESULTS, write_result

from transmla.evaluate.compare import evaluate_models
from transmla.recipe import Evaluation, parse_recipe
from transmla.reporter import Silent
from transmla.workflow import convert_and_heal

BUDGETS = (0.5, 0.25)
WINDOW, WINDOWS = 1024, 12


class Stages(Silent):
    """Prints when each stage begins, in seconds, and keeps the list."""

    def __init__(self) -> None:
        self.began, self.stages = time.monotonic(), list[tuple[float, str]]()

    def stage(self, name: str, total: int) -> None:
        self.stages.append((round(time.monotonic() - self.began, 1), name))
        print(*self.stages[-1], flush=True)

    def message(self, text: str) -> None:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the source: checkpoint folder, .gguf file or Hub id")
    parser.add_argument("--name", required=True, help="name of the model in the table")
    parser.add_argument("--text", action="append", default=[], help="NAME:FILE of a text that calibration never sees")
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS, help="shares of the cache to keep")
    parser.add_argument("--training-free", action="store_true", help="also convert with --heal off")
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens per window")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows per text")
    parser.add_argument("--device", default="auto", help="device to run on: auto, cpu, cuda, …")
    parser.add_argument("--work", type=Path, default=Path("defaults-work"), help="scratch folder")
    parser.add_argument("--result", type=Path, default=RESULTS / "defaults/defaults.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    given = dict(text.split(":", 1) for text in arguments.text)
    texts = (*given.values(), "pydoc", "stdlib")
    names = (*given, "pydoc", "stdlib")
    rows: list[dict[str, Any]] = []
    for budget in arguments.budgets:
        for heal in ("auto", "off") if arguments.training_free else ("auto",):
            folder = arguments.work / f"{arguments.name}-{budget:g}-{heal}"
            shutil.rmtree(folder, ignore_errors=True)
            asked = {"source": arguments.model, "output": str(folder), "cache_ratio": budget, "heal": heal}
            reporter = Stages()
            convert_and_heal(parse_recipe(asked | {"device": arguments.device}, "defaults.py"), reporter=reporter)
            seconds = round(time.monotonic() - reporter.began)
            settings = Evaluation(text=texts, window=arguments.window, max_windows=arguments.windows)
            run: dict[str, Any] = {"device": arguments.device, "reporter": Silent()}
            found = evaluate_models(str(folder), arguments.model, settings, **run)
            manifest = json.loads((folder / "transmla.json").read_text())
            shape = manifest["plan"]["shape"]
            row = {
                "model": arguments.name,
                "budget": budget,
                "heal": heal,
                "healed": bool(manifest["healing"]),
                "rotary + latent": f"{shape['qk_rope_head_dim']} + {shape['kv_lora_rank']}",
                "seconds": seconds,
                "stages": reporter.stages,
                "mean KL": found["mean"]["kl"],
                "texts": [dict(text, text=name) for name, text in zip(names, found["texts"], strict=True)],
            }
            rows.append(row)
            kl = ", ".join(f"{text['text']} {text['kl']:.3f}" for text in row["texts"])
            print(f"{arguments.name} {budget:.0%} heal {heal}: {seconds} s, KL {row['mean KL']:.4f} ({kl})", flush=True)
            write_result(arguments.result, rows, arguments.commit)


if __name__ == "__main__":
    main()
