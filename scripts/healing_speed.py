"""Measure the training speed of healing, in tokens per second, on one GPU and on several.

    python scripts/healing_speed.py EXPORT --teacher SOURCE --data text.txt --processes 2

Every way of starting takes the same steps on the same batches from the same start. The timed part begins after the
first evaluation on held-out text, when the code is compiled. It ends before anything is written. The later evaluations
are part of it. Several GPUs are used with the files in recipes/accelerate. The way ``share`` runs one process of
several without the others (one_of_many.py): the speed of all, if exchanges took no time. Its curve means nothing.
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
    """Return the command that starts ``transmla.heal``.

    Args:
        way: ``one`` for a single process, ``share`` for one of several, or the name of a file in recipes/accelerate.
        processes: number of processes of every way but ``one``.
    """
    python = [sys.executable, "-m"]
    if way == "one":
        # One process uses one GPU, even if the machine has more.
        return [*python, "transmla.heal"]
    if way == "share":
        share = [str(Path(__file__).with_name("one_of_many.py")), str(processes)]
        return [sys.executable, *share, "-m", "transmla.heal"]
    recipe = ["--config_file", str(RECIPES / f"{way}.yaml"), "--num_processes", str(processes)]
    return [*python, "accelerate.commands.launch", *recipe, "-m", "transmla.heal"]


def measure(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Heal once, and return tokens per second and the held-out curve, which should agree between the ways."""
    output = cleared(arguments.work / way)
    tokens = arguments.steps * arguments.batch * arguments.length
    sizes = {"batch": arguments.batch, "length": arguments.length, "max-tokens": tokens, "held-out": 4}
    intervals = {"eval-every": arguments.eval_every, "save-every": arguments.steps}
    options = [word for name, value in (sizes | intervals).items() for word in (f"--{name}", str(value))]
    options += ["--trainable", arguments.trainable, "--compile" if arguments.compile else "--no-compile"]
    texts = ["--teacher", arguments.teacher, "--data", arguments.data]
    command = [*launcher(way, arguments.processes), str(arguments.export), *texts, *options, "-o", str(output)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{way}: {process.stderr[-3000:]}")
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
    parser.add_argument("export", type=Path, help="export to heal")
    parser.add_argument("--teacher", required=True, help="the source of the export")
    parser.add_argument("--data", required=True, help="text to train on")
    parser.add_argument(
        "--ways",
        nargs="*",
        default=("one", "ddp", "fsdp2", "deepspeed"),
        help="one, share, or names of files in recipes/accelerate",
    )
    parser.add_argument("--processes", type=int, default=2, help="processes of every way but one")
    parser.add_argument("--batch", type=int, default=128, help="sequences per step, over all processes")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=150, help="training steps")
    parser.add_argument(
        "--eval-every",
        type=int,
        default=Healing.model_fields["eval_every"].default,
        help="steps between evaluations on held-out text",
    )
    parser.add_argument("--trainable", default="all", help="weights to train: attention, all or lora")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the layers and the loss"
    )
    parser.add_argument("--work", type=Path, default=Path("healing-work"), help="scratch folder")
    parser.add_argument(
        "--result", type=Path, default=RESULTS / "healing_speed/two-gpus.json", help="JSON file to write"
    )
    parser.add_argument("--commit", help="commit to record, for a copy of the tree without git history")
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
