"""Feed damaged inputs to every verb, and count what happens.

    python scripts/fuzz.py --cases 10000 --json scripts/results/fuzz/fuzz.json

Hypothesis draws the cases (``fuzz_cases.py``). Every case runs in a forked process of its own, on a copy of a tiny random
model or export. A case is a fault if the process prints a traceback, dies, uses more than 5 s of processor time or 2 GB of
memory, prints control characters, or refuses in another way than by one line. The cases in ``fuzz_seeds.jsonl`` run first:
faults that were found and mended. New faults are appended to the file that ``--keep`` names.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]
# Variables that libraries read when they are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRITON_INTERPRET": "1", "COLUMNS": "200"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzz_cases import INPUTS, Case, apply  # noqa: E402

SEEDS = Path(__file__).with_name("fuzz_seeds.jsonl")
# Limits of one case: seconds of processor time, seconds of wall time, bytes of resident memory.
CPU_SECONDS, WALL_SECONDS, MEMORY = 5.0, 40.0, 2 * 10**9
# Address space that a case may use in addition, so that one fault cannot exhaust the machine.
ADDRESS_SPACE = 6 * 2**30
FAULTS = ("traceback", "hang", "memory", "crash", "untidy")
OUTCOMES = ("refused", "accepted", *FAULTS)
TEXT = ["--calibration-sequences", "4", "--calibration-length", "32", "--device", "cpu", "--cache-ratio", "0.5"]
HEAL = [
    "--length",
    "16",
    "--batch",
    "2",
    "--held-out",
    "2",
    "--max-tokens",
    "32",
    "--eval-every",
    "1",
    "--save-every",
    "1",
    "--device",
    "cpu",
]


def build_bases(root: Path) -> None:
    """Write tiny sources, exports and a GGUF file into ``root``, one folder each, and the calibration text."""
    import torch
    from helpers.tiny_gguf import write_gguf
    from helpers.tiny_sources import build_model, build_tokenizer

    picks = torch.randint(0, 26, (4000,), generator=torch.Generator().manual_seed(1))
    (root / "text.txt").write_text(" ".join(chr(97 + int(i)) for i in picks))
    for name in ("llama", "qwen3", "gemma3_text", "phi3", "gpt_oss", "sharded"):
        model = build_model("llama" if name == "sharded" else name)
        model.save_pretrained(root / name, max_shard_size="40KB" if name == "sharded" else "1GB")
        build_tokenizer(root / name)
    (root / "llama" / "recipe.yaml").write_text(
        "source: .\noutput: out\ncache_ratio: 0.5\nreconstruct: 'off'\nheal: 'off'\nseed: 0\ndevice: cpu\n"
        "calibration: {source: text.txt, sequences: 4, length: 32}\n"
    )
    text = str(root / "text.txt")
    for base, name in (("llama", "native"), ("qwen3", "own")):
        arguments = [str(root / base), "-o", str(root / name), "--calibration", text, "--reconstruct", "off", *TEXT]
        assert _forked(["convert", *arguments], root)[0] == "accepted", name
        assert _forked(["verify", str(root / name)], root)[0] == "accepted", name
    arguments = [str(root / "native"), "--teacher", str(root / "llama"), "-o", str(root / "healed"), "--data", text]
    assert _forked(["heal", *arguments, *HEAL], root)[0] == "accepted", "healed"
    (root / "gguf").mkdir()
    write_gguf(root / "gguf")


def command(verb: str, folder: Path, root: Path) -> list[str]:
    """Return the arguments of a case's command line. ``folder`` holds the changed copy and is the working folder."""
    text, out, source = str(root / "text.txt"), "out", "."
    calibration = ["--calibration", text, *TEXT]
    evaluation = ["--text", text, "--window", "32", "--max-windows", "2", "--device", "cpu"]
    bench = ["--batch", "1", "--context", "8", "--steps", "1", "--device", "cpu"]
    known: dict[str, list[str]] = {
        "plan": ["plan", source, *calibration],
        "inspect": ["inspect", source, *calibration],
        "convert": ["convert", source, "-o", out, "--reconstruct", "off", *calibration],
        "eval": ["eval", source, *evaluation],
        "bench": ["bench", source, *bench],
        "verify": ["verify", source, "--source", str(root / "llama")],
        "push": ["push", source, "org/name", "--dry-run"],
        "heal": ["heal", source, "--teacher", str(root / "llama"), "-o", out, "--data", text, *HEAL],
        "teacher": ["heal", str(root / "native"), "--teacher", source, "-o", out, "--data", text, *HEAL],
        "recipe-plan": ["plan", "recipe.yaml"],
        "recipe-convert": ["convert", "recipe.yaml", "--calibration-sequences", "4", "--calibration-length", "32"],
        "gguf-plan": ["plan", "model.gguf", *calibration],
        "gguf-eval": ["eval", "model.gguf", *evaluation],
        "chat": ["eval", source, *evaluation[:1], "chat.jsonl", *evaluation[2:]],
        "load": ["load", source],
        "card": ["card", source],
    }
    return known[verb]


def call(arguments: list[str]) -> int:
    """Run one command line in this process, and return its exit code. ``load`` and ``card`` are calls from Python."""
    from transmla.cli import main
    from transmla.errors import TransmlaError

    if arguments[0] in ("load", "card"):
        try:
            _load() if arguments[0] == "load" else _card()
        except TransmlaError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    sys.argv = ["transmla", *arguments]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    return 0


def _load() -> None:
    import torch

    from transformers.utils import logging

    import transmla

    logging.set_verbosity_error()
    transmla.load(".", dtype=torch.float32)


def _card() -> None:
    from transmla.export.card import write_card
    from transmla.export.manifest import Manifest
    from transmla.formats.base import format_named
    from transmla.recipe import read_recipe

    manifest = Manifest.read(Path())
    words = format_named(manifest.format).card_words(manifest.plan.spec)
    write_card(Path(), manifest, read_recipe(Path("recipe.yaml"), {"output": "x"}), words)


def run_case(case: Case, root: Path) -> tuple[str, str]:
    """Run one case, and return its outcome and what the process printed."""
    folder = Path(tempfile.mkdtemp(dir=root / "runs"))
    try:
        shutil.copytree(root / case["base"], folder, dirs_exist_ok=True, copy_function=os.link)
        if case["verb"] in ("recipe-plan", "recipe-convert"):
            os.link(root / "text.txt", folder / "text.txt")
        if case["verb"] == "chat":
            (folder / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "the cat sat"}]}\n' * 20)
        apply(folder, case["edits"])
        if case["input"] == "gguf" and any(edit[1] == "fields.json" for edit in case["edits"]):
            from helpers.tiny_gguf import rewrite_gguf

            with suppress(
                ValueError, OverflowError, AttributeError
            ):  # GGUF has no such value: the file is half written
                rewrite_gguf(folder)
        return _forked(command(case["verb"], folder, root), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _forked(arguments: list[str], folder: Path) -> tuple[str, str]:
    """Run a command line in a forked process with ``folder`` as working folder; return outcome and output."""
    output = folder.parent / f"{folder.name}.output"
    child = os.fork()
    if child == 0:
        _child(arguments, folder, output)
    began = time.monotonic()
    while True:
        finished, status, usage = os.wait4(child, os.WNOHANG)
        late = time.monotonic() - began > WALL_SECONDS
        if finished or late:
            break
        time.sleep(0.005)
    if late and not finished:
        os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    text = output.read_text(encoding="utf-8", errors="replace")
    output.unlink()
    return _outcome(status, usage, text, late=late), text


def _child(arguments: list[str], folder: Path, output: Path) -> None:
    code = 70
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for old, new in ((null, 0), (descriptor, 1), (descriptor, 2)):
            os.dup2(old, new)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE,) * 2)
        spent = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(spent.ru_utime + spent.ru_stime + 2 * CPU_SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        os.chdir(folder)
        code = call(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _outcome(status: int, usage: Any, text: str, *, late: bool) -> str:
    if late or usage.ru_utime + usage.ru_stime > CPU_SECONDS:
        return "hang"
    if usage.ru_maxrss * 1024 > MEMORY:
        return "memory"
    if "Traceback (most recent call last)" in text:
        return "traceback"
    if os.WIFSIGNALED(status):
        return "crash"
    code = os.WEXITSTATUS(status)
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text) or (code == 2 and len(lines) != 1) or code not in (0, 1, 2):
        return "untidy"
    return "refused" if code else "accepted"


def preload() -> None:
    """Import once what every case needs, so that a forked process starts at once."""
    import datasets  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: F401
    from transformers.models.deepseek_v3 import modeling_deepseek_v3  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import transmla.cli.console
    import transmla.evaluate.verify
    import transmla.heal.run
    import transmla.workflow  # noqa: F401

    torch.set_num_threads(1)


class Tally:
    """Counts of outcomes by input, and the faults."""

    def __init__(self, root: Path, keep: Path | None) -> None:
        self.root, self.keep = root, keep
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in INPUTS}
        self.faults: dict[str, int] = {}

    def add(self, case: Case) -> str:
        """Run a case and count it; return its outcome."""
        outcome, text = run_case(case, self.root)
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
    preload()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "runs").mkdir()
        build_bases(root)
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


def draw(tally: Tally, inputs: list[str], cases: int, seed: int) -> None:
    """Draw and run ``cases`` cases of ``inputs``, in their shares."""
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
        @given(strategy(tally.root))
        def each(case: Case) -> None:
            tally.add(case)

        each()
        print(f"{name}: {tally.counts[name].total():,} cases", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
