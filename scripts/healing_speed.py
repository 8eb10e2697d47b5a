"""Tokens a second that healing learns from: on one GPU, and on several by the recipes for accelerate.

    python scripts/healing_speed.py EXPORT --teacher SOURCE --data text.txt --processes 2

Every way learns the same steps of the same batches from the same start; what is timed begins after the first looks,
when code is compiled, and ends before anything is written. Looks at the text kept aside are part of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from healing import cleared
from provenance import RESULTS, write_result

from transmla.heal.settings import Healing

RECIPES = Path(__file__).parents[1] / "recipes" / "accelerate"


def launcher(way: str, processes: int) -> list[str]:
    """What starts ``transmla.heal``: ``one`` process, or a recipe's."""
    python = [sys.executable, "-m"]
    if way == "one":
        # One process learns on one GPU, however many there are.
        return [*python, "transmla.heal"]
    recipe = ["--config_file", str(RECIPES / f"{way}.yaml"), "--num_processes", str(processes)]
    return [*python, "accelerate.commands.launch", *recipe, "-m", "transmla.heal"]


def measure(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Heal ``way``; tokens a second, and the curve, which should be the same for all."""
    output = cleared(arguments.work / way)
    tokens = arguments.steps * arguments.batch * arguments.length
    sizes = {"batch": arguments.batch, "length": arguments.length, "max-tokens": tokens, "held-out": 4}
    looks = {"eval-every": arguments.eval_every, "save-every": arguments.steps}
    options = [word for name, value in (sizes | looks).items() for word in (f"--{name}", str(value))]
    options += ["--trainable", arguments.trainable, "--compile" if arguments.compile else "--no-compile"]
    texts = ["--teacher", arguments.teacher, "--data", arguments.data]
    command = [*launcher(way, arguments.processes), str(arguments.export), *texts, *options, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr[-3000:]}")
    curve = json.loads((output / "transmla.json").read_text())["healing"][-1]["curve"]
    first, last = curve[1], curve[-1]
    return {
        "way": way,
        "processes": 1 if way == "one" else arguments.processes,
        "batch": arguments.batch,
        "length": arguments.length,
        "tokens per second": round((last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])),
        "held-out KL": [round(point["held_out_kl"], 4) for point in curve],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True, help="text to learn from")
    parser.add_argument("--ways", nargs="*", default=("one", "ddp", "fsdp2", "deepspeed"), help="one, or recipes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128, help="sequences a step, over all processes")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--eval-every", type=int, default=Healing.model_fields["eval_every"].default)
    parser.add_argument("--trainable", default="all")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--work", type=Path, default=Path("healing-work"))
    parser.add_argument("--result", type=Path, default=RESULTS / "healing-speed.json")
    parser.add_argument("--commit", help="commit to record where git has no history")
    arguments = parser.parse_args()
    if arguments.steps < 2 * arguments.eval_every:
        parser.error(f"--steps {arguments.steps}: at least {2 * arguments.eval_every}, twice --eval-every")
    rows: list[dict[str, Any]] = []
    for way in arguments.ways:
        rows.append(measure(way, arguments))
        print(f"{way}: {rows[-1]['tokens per second']:,} tokens/s, KL {rows[-1]['held-out KL']}", flush=True)
        write_result(arguments.result, rows, arguments.commit)


if __name__ == "__main__":
    main()
