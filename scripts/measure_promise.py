"""Measure what ``--cache-ratio auto`` promises, keeps and saves: the table in docs/choosing.md.

python scripts/measure_promise.py SOURCE --calibrate TEXT --check TEXT --check TEXT --accept 0.1 --accept 0.3

For each accepted KL, the cache is chosen on held-out rows of the calibration text. The chosen conversion is then
measured on rows of the other texts, and beside it the conversion with one width in all layers and about as much cache.
All are closed forms unless ``--reconstruct`` names a fit. One line of JSON a result.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from transmla.convert import choose_budget as chooser
from transmla.convert.held_rows import Rows, held_rows
from transmla.convert.prepare import Prepared, plan_at, prepare, with_plan
from transmla.plan.shape_ladder import FINE_RATIOS, ladder
from transmla.recipe import parse_recipe
from transmla.reporter import Silent
from transmla.source.load import load_tokenizer
from transmla.source.output_head import OutputHead
from transmla.source.text import load_blocks


class Told(Silent):
    """Prints the lines of a conversion."""

    def message(self, text: str) -> None:
        """Print one line."""
        print("#", text, flush=True)


def main() -> None:
    """Measure, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--calibrate", default="wikitext")
    parser.add_argument("--check", action="append", required=True)
    parser.add_argument("--accept", action="append", type=float, required=True)
    parser.add_argument("--format", default="auto")
    parser.add_argument("--reconstruct", default="off")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    given = parser.parse_args()
    calibration = {"source": given.calibrate, "sequences": given.sequences, "length": given.length}
    settings = {
        "source": given.source,
        "format": given.format,
        "reconstruct": given.reconstruct,
        "heal": "off",
        "device": "cpu",
    }
    tokenizer = load_tokenizer(Path(given.source))
    held = held_rows(given.length)
    read = partial(load_blocks, tokenizer=tokenizer, length=given.length, column=None)
    text = read(given.calibrate, sequences=given.sequences + held, split=None)
    checks = [read(name, sequences=held, split=None) for name in given.check]
    rows = Rows(text[:held], torch.cat(checks), text[held:])
    measure = chooser.measure_costs
    cached: dict[str, Any] = {}

    def measured_once(*args: Any, **options: Any) -> Any:
        if not cached:
            cached["costs"] = measure(*args, **options)
        return cached["costs"]

    chooser.measure_costs = measured_once
    for accepted in given.accept:
        recipe = {**settings, "calibration": calibration, "cache_ratio": "auto", "max_kl": accepted}
        prepared = prepare(parse_recipe(recipe, "command line"))
        began = time.monotonic()
        choice = chooser.choose_budget(prepared, rows, None, Told())
        seconds = time.monotonic() - began
        chosen = chooser.with_choice(prepared, choice)
        plans = ladder(partial(plan_at, prepared), FINE_RATIOS).values()
        equal = min(plans, key=lambda plan: abs(plan.model_cache_values - chosen.plan.model_cache_values))
        print(
            json.dumps(
                {
                    "accepted": accepted,
                    "expected": choice.expected,
                    "trials": choice.trials,
                    "seconds": round(seconds),
                    "chosen": _measured(chosen, rows, given.check),
                    "one width": _measured(with_plan(prepared, equal), rows, given.check),
                    "widths": [chosen.plan.at(i).shape.cache_values for i in range(len(choice.ratios))],
                    "kept": chosen.plan.kept,
                }
            ),
            flush=True,
        )


def _measured(prepared: Prepared, rows: Rows, names: list[str]) -> dict[str, float]:
    """Return the share of the cache, and the KL on each of the checked texts and on the text that chose."""
    held = torch.cat([rows.choosing, rows.checking])
    _, streams = chooser.convert_unwritten(prepared, rows.calibration, held, None, Silent(), "measured")
    source, spec = prepared.source, prepared.plan.spec
    head = OutputHead(source.model, source.checkpoint, source.family, prepared.device)
    sizes = [len(rows.choosing)] + [len(rows.checking) // len(names)] * len(names)
    assert streams.held_source is not None
    assert streams.held_export is not None
    parts = zip(streams.held_source.split(sizes), streams.held_export.split(sizes), strict=True)
    kl = {name: round(head.divergence(*part), 4) for name, part in zip(["chosen on", *names], parts, strict=True)}
    return {"cache": round(prepared.plan.model_cache_values / spec.cache_values / spec.num_hidden_layers, 4), **kl}


if __name__ == "__main__":
    main()
