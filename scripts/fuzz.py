"""Feed damaged inputs to every verb, and count what happens.

    python scripts/fuzz.py --cases 10000 --json FILE

Hypothesis draws the cases (``fuzz_cases.py``). Every case runs in a forked process of its own, on a copy of a tiny
random model or export. A case is a fault if the process prints a traceback, dies, uses more than 5 s of processor time
or 2 GB of memory, prints control characters, or refuses in another way than by one line. The cases in
``fuzz_seeds.jsonl`` run first: faults that were found and mended. ``--keep`` names a file for new ones.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

import fuzz_run
from fuzz_cases import INPUTS, Case
from fuzz_run import FAULTS, LIGHT_VERBS, OUTCOMES

SEEDS = Path(__file__).with_name("fuzz_seeds.jsonl")


class Tally:
    """Counts of outcomes by input, and the faults."""

    def __init__(self, root: Path, keep: Path | None) -> None:
        self.root, self.keep = root, keep
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in INPUTS}
        self.faults: dict[str, int] = {}

    def add(self, case: Case) -> str:
        """Run a case and count it; return its outcome."""
        outcome, text = fuzz_run.run_case(case, self.root)
        self.counts[case["input"]][outcome] += 1
        if outcome in FAULTS:
            place = _last_frame(text) if outcome == "traceback" else f"{outcome} {case['verb']}"
            self.faults[place] = self.faults.get(place, 0) + 1
            if self.keep and self.faults[place] <= 3:
                with self.keep.open("a") as file:
                    file.write(json.dumps({**case, "was": place}) + "\n")
        return outcome

    def table(self) -> str:
        """Return the counts as a Markdown table."""
        lines = ["| input | tried | " + " | ".join(OUTCOMES) + " |", "|---|" + "---|" * (len(OUTCOMES) + 1)]
        total: Counter[str] = sum(self.counts.values(), Counter())
        for name, counts in [*self.counts.items(), ("all", total)]:
            cells = [f"{counts.total():,}", *(f"{counts[outcome]:,}" for outcome in OUTCOMES)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def _last_frame(text: str) -> str:
    """Name the last line of this package in a traceback, and the error."""
    frames = re.findall(r'File ".*?(transmla/[\w/]+\.py)", line (\d+)', text)
    error = [
        line for line in text.strip().splitlines() if re.match(r"[\w.]+(Error|Exception|Warning|Interrupt)\b", line)
    ]
    return f"{':'.join(frames[-1]) if frames else '?'} {error[-1][:120] if error else ''}"


def main() -> None:
    """Run the kept seeds and the drawn cases, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--cases", type=int, default=10_000, help="number of cases that are drawn")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawing")
    parser.add_argument("--only", choices=list(INPUTS), action="append", help="draw cases of this input only")
    parser.add_argument("--keep", type=Path, help="append new faults to this file, one JSON line each")
    parser.add_argument("--json", type=Path, help="write the counts with their provenance to this file")
    parser.add_argument("--commit", help="commit to record, for a copy without git history")
    arguments = parser.parse_args()
    with fuzz_run.bases() as root:
        tally = Tally(root, arguments.keep)
        faulty = replay(tally)
        draw(tally, arguments.only or list(INPUTS), arguments.cases, arguments.seed)
    print(tally.table())
    for place, times in sorted(tally.faults.items(), key=lambda item: -item[1]):
        print(f"{times:5}  {place}")
    if arguments.json:
        from provenance import write_result

        rows = [{"input": key, **{o: counts[o] for o in OUTCOMES}} for key, counts in tally.counts.items()]
        write_result(arguments.json, rows, arguments.commit)
    raise SystemExit(bool(tally.faults or faulty))


def replay(tally: Tally) -> int:
    """Run the kept seeds; return how many are faults again."""
    lines = SEEDS.read_text().splitlines() if SEEDS.is_file() else []
    return sum(tally.add(json.loads(line)) in FAULTS for line in lines)


def draw(tally: Tally, inputs: list[str], cases: int, seed: int, *, light: bool = False) -> None:
    """Draw and run ``cases`` cases of ``inputs``, in their shares. ``light`` draws only cases that read sources."""
    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings

    total = sum(INPUTS[name][0] for name in inputs)
    for name in inputs:
        share, strategy = INPUTS[name]
        number = max(1, round(cases * share / total))

        @hypothesis.seed(seed)
        @settings(
            max_examples=number,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy(tally.root, light) if name == "config" else strategy(tally.root))
        def each(case: Case) -> None:
            if not light or case["verb"] in LIGHT_VERBS:
                tally.add(case)

        each()
        print(f"{name}: {tally.counts[name].total():,} cases", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
