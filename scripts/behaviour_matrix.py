"""Compare accelerated models with stock ones: every family, cache, attention implementation and padding.

    python scripts/behaviour_matrix.py --json FILE.json

Every model is random and four layers deep; exports are tried with all layers converted, and with one layer kept. The
expected logits are those of the stock model under eager attention, over the same cache. A cell is ``equal``,
``refused`` if the accelerated model raises what the stock model raises, ``wrong``, or ``crashed``. The quantised cache
needs the package ``hqq``.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.behaviour import ALL_FAMILIES, CACHES, FAMILIES, KEPT, PADDINGS, logits_by_step, relative, stock_model
from transformers import QuantizedCache
from transformers.utils import logging

import transmla

# Largest relative difference in float32.
ROUNDING = 2e-5
IMPLEMENTATIONS = ("latent_attention", "eager", "sdpa", "flex_attention", "latent_attention")
# Flex attention compiles a kernel for each shape, which takes seconds: only these caches.
FLEX_CACHES = ("dynamic",)
QUANTISED: dict[str, Callable[[Any], Any]] = {
    "quantised, hqq": lambda config: QuantizedCache(
        "hqq", config, nbits=8, axis_key=1, axis_value=1, q_group_size=8, residual_length=3
    ),
}
OUTCOMES = ("equal", "refused", "wrong", "crashed")


def cells(family: str, implementations: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield one row for each cell of a ``family``, once with all layers converted and once with one layer kept."""
    for keep in ((), (KEPT,)) if family in FAMILIES else ((),):
        with tempfile.TemporaryDirectory() as folder:
            stock = stock_model(family, Path(folder), keep=keep)
        model = transmla.accelerate(copy.deepcopy(stock))
        for name, make in (CACHES | QUANTISED).items():
            for padding in PADDINGS:
                # A quantised cache takes its scale from padded rows too, which SDPA and eager attention fill otherwise.
                reference = "eager" if name in CACHES or not stock._supports_sdpa else "sdpa"
                expected = outcome(stock, reference, make, padding)
                for implementation in implementations:
                    if implementation == "flex_attention" and name not in FLEX_CACHES:
                        continue
                    row = {"family": family, "kept": len(keep), "attention": implementation}
                    row |= {"cache": name, "padding": padding}
                    actual = outcome(model, implementation, make, padding)
                    yield row | judged(actual, expected, outcome_of_stock(stock, implementation, make, padding, actual))


def outcome(model: Any, implementation: str, make: Callable[[Any], Any], padding: str) -> torch.Tensor | str:
    """Return the logits of ``model``, or the error as one line."""
    try:
        model.set_attn_implementation(implementation)
        return logits_by_step(model, make(model.config), padding)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def outcome_of_stock(
    stock: Any, implementation: str, make: Callable[[Any], Any], padding: str, actual: torch.Tensor | str
) -> torch.Tensor | str | None:
    """Return what the stock model does in a cell in which the accelerated one fails; None if it does not fail."""
    return outcome(stock, implementation, make, padding) if isinstance(actual, str) else None


def judged(actual: Any, expected: Any, stock: Any) -> dict[str, Any]:
    """Return the outcome of a cell, and its relative difference or its error."""
    if isinstance(actual, str):
        same = isinstance(stock, str) and _kind(stock) == _kind(actual)
        return {"outcome": "refused" if same else "crashed", "error": actual}
    if isinstance(expected, str):
        return {"outcome": "wrong", "error": f"the stock model is refused under eager attention: {expected}"}
    difference = relative(actual, expected)
    return {"outcome": "equal" if difference < ROUNDING else "wrong", "difference": difference}


def _kind(error: str) -> str:
    """The error without the model's class, which differs between exports and their sources."""
    return re.sub(r"(Transmla|Latent)?\w+For\w+", "Model", error)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the counts by attention implementation as a Markdown table."""
    lines = ["| attention | tried | " + " | ".join(OUTCOMES) + " |", "|---|" + "---|" * (len(OUTCOMES) + 1)]
    for name in (*dict.fromkeys(row["attention"] for row in rows), "all"):
        counts = Counter(row["outcome"] for row in rows if name in (row["attention"], "all"))
        lines.append(f"| {name} | {counts.total():,} | {' | '.join(f'{counts[o]:,}' for o in OUTCOMES)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the matrix, print the table and the cells that are wrong, and return how many there are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=ALL_FAMILIES)
    parser.add_argument("--attention", nargs="+", default=IMPLEMENTATIONS)
    parser.add_argument("--json", type=Path, help="write all cells to this file")
    parser.add_argument("--commit", help="commit to record, for a copy without git history")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    for family in arguments.families:
        found = list(cells(family, tuple(arguments.attention)))
        print(family, dict(Counter(row["outcome"] for row in found)), flush=True)
        rows += found
    print(table(rows))
    bad = [row for row in rows if row["outcome"] in ("wrong", "crashed")]
    for row in bad:
        print(row)
    if arguments.json:
        write_result(arguments.json, rows, arguments.commit)
    return min(len(bad), 1)


if __name__ == "__main__":
    sys.exit(main())
