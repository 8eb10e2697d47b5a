"""Measure what `transmla convert` gives with its defaults: the table of docs/results.md.

    python scripts/defaults.py MODEL --name NAME --text wikitext:test.txt --text quotes:quotes.txt

Every option of the conversion keeps its default but the cache ratio. The script reports time, perplexity and KL to the
source on each text: the given ones, which calibration must never see, and the test splits of `pydoc` and `stdlib`. The
export before its healing is measured as well.
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
    """Prints when each stage begins, in seconds, and keeps the list; copies the export before its healing."""

    def __init__(self, folder: Path) -> None:
        self.unhealed, self.copy = folder.with_name(folder.name + ".unhealed"), folder.with_name(folder.name + "-off")
        self.began, self.copying, self.stages = time.monotonic(), 0.0, list[tuple[float, str]]()
        self.phases: dict[str, float] = {}

    def seconds(self) -> float:
        """Return the seconds since the beginning, without those of the copy."""
        return time.monotonic() - self.began - self.copying

    def stage(self, name: str, total: int) -> None:
        self.stages.append((round(self.seconds(), 1), name))
        print(*self.stages[-1], flush=True)
        if name == "healing":
            began = time.monotonic()
            shutil.copytree(self.unhealed, self.copy)
            self.copying = time.monotonic() - began

    def spent(self, phase: str, seconds: float) -> None:
        self.phases[phase] = round(seconds, 1)

    def message(self, text: str) -> None:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the source: checkpoint folder, .gguf file or Hub id")
    parser.add_argument("--name", required=True, help="name of the model in the table")
    parser.add_argument("--text", action="append", default=[], help="NAME:FILE of a text that calibration never sees")
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS, help="shares of the cache to keep")
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens per window")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows per text")
    parser.add_argument("--heal", default="auto", help="as for `transmla convert`")
    parser.add_argument("--device", default="auto", help="device to run on: auto, cpu, cuda, …")
    parser.add_argument("--work", type=Path, default=Path("defaults-work"), help="scratch folder")
    parser.add_argument("--result", type=Path, default=RESULTS / "defaults/defaults.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
    arguments = parser.parse_args()
    given = dict(text.split(":", 1) for text in arguments.text)
    texts = (*given.values(), "pydoc", "stdlib")
    names = (*given, "pydoc", "stdlib")
    settings = Evaluation(text=texts, window=arguments.window, max_windows=arguments.windows)
    rows: list[dict[str, Any]] = []
    for budget in arguments.budgets:
        folder = arguments.work / f"{arguments.name}-{budget:g}"
        reporter = Stages(folder)
        for old in (folder, reporter.copy):
            shutil.rmtree(old, ignore_errors=True)
        recipe = {
            "source": arguments.model,
            "output": str(folder),
            "cache_ratio": budget,
            "device": arguments.device,
            "heal": arguments.heal,
        }
        convert_and_heal(parse_recipe(recipe, "defaults.py"), reporter=reporter)
        seconds = round(reporter.seconds())
        manifest = json.loads((folder / "transmla.json").read_text())
        shape = manifest["plan"]["shape"]
        row: dict[str, Any] = {
            "model": arguments.name,
            "budget": budget,
            "rotary + latent": f"{shape['qk_rope_head_dim']} + {shape['kv_lora_rank']}",
            "seconds": seconds,
            "stages": reporter.stages,
            "phases": reporter.phases,
        }
        measured = {"export": folder, "before healing": reporter.copy}
        for what, export in measured.items():
            if export.exists():
                found = evaluate_models(
                    str(export), arguments.model, settings, device=arguments.device, reporter=Silent()
                )
                scores = [dict(text, text=name) for name, text in zip(names, found["texts"], strict=True)]
                row[what] = {"mean KL": found["mean"]["kl"], "texts": scores}
                kl = ", ".join(f"{text['text']} {text['kl']:.3f}" for text in scores)
                print(f"{arguments.name} {budget:.0%} {what}: KL {found['mean']['kl']:.4f} ({kl})", flush=True)
        print(f"{arguments.name} {budget:.0%}: {seconds} s", flush=True)
        rows.append(row)
        write_result(arguments.result, rows, arguments.commit)


if __name__ == "__main__":
    main()
