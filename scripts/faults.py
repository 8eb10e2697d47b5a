"""Count how many planted faults ``verify`` catches, and how many killed runs end in the same bytes.

    python scripts/faults.py --planted 216 --kills 500

Damaged inputs are counted by ``fuzz.py``, and every field of every config by ``config_walk.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import faults_kills
import faults_planted
import torch
from provenance import write_result


def main(arguments: list[str] | None = None) -> int:
    """Run both, print two tables and what went wrong; return 1 if anything did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", type=int, default=216, help="number of planted faults")
    parser.add_argument("--kills", type=int, default=500, help="number of runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    parser.add_argument("--json", type=Path, help="write both tables with their provenance to this file")
    parser.add_argument("--commit", help="commit to record, for a copy without git history")
    given = parser.parse_args(arguments)
    planted = faults_planted.run(given.planted, seed=given.seed)
    print(faults_planted.table(planted))
    passed = [f"not caught by verify --source: {name}" for name, _, caught in planted if not caught]
    killed = faults_kills.run(given.kills, given.seed)
    print("\n| run | resumed | of these killed | same bytes |\n|---|---|---|---|")
    for row in killed:
        print(f"| {row['job']} | {row['runs']} | {row['killed']} | {row['equal']} |")
        passed += [f"{row['job']}: {fault}" for fault in row["faults"]]
    print(*passed, sep="\n")
    if given.json:
        faults = [{"fault": name, "verify": plain, "verify --source": full} for name, plain, full in planted]
        write_result(given.json, [{"planted": faults, "kills": killed}], given.commit)
    return int(bool(passed))


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
