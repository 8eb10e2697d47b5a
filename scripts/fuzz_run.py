"""Run one case of ``fuzz.py`` in a forked process, on copies of tiny sources and exports."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]
# Variables that libraries read when they are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRITON_INTERPRET": "1", "COLUMNS": "200"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzz_cases import Case, apply  # noqa: E402

# Limits of one case: seconds of processor time, seconds of wall time, bytes of resident memory.
CPU_SECONDS, WALL_SECONDS, MEMORY = 5.0, 40.0, 2 * 10**9
# Address space that a case may use in addition, so that one fault cannot exhaust the machine.
ADDRESS_SPACE = 6 * 2**30
FAULTS = ("traceback", "hang", "memory", "crash", "untidy")
OUTCOMES = ("refused", "accepted", *FAULTS)
# Verbs that need no export, and take a fraction of a second.
LIGHT_VERBS = ("plan", "recipe-plan", "eval", "chat")
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


def build_sources(root: Path) -> None:
    """Write tiny sources into ``root``, one folder each, a recipe, and the calibration text."""
    import torch
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


def build_bases(root: Path) -> None:
    """Write tiny sources, exports and a GGUF file into ``root``, one folder each."""
    from helpers.tiny_gguf import write_gguf

    build_sources(root)
    text = str(root / "text.txt")
    for base, name in (("llama", "native"), ("qwen3", "own")):
        arguments = [str(root / base), "-o", str(root / name), "--calibration", text, "--reconstruct", "off", *TEXT]
        assert forked(["convert", *arguments], root)[0] == "accepted", name
        assert forked(["verify", str(root / name)], root)[0] == "accepted", name
    arguments = [str(root / "native"), "--teacher", str(root / "llama"), "-o", str(root / "healed"), "--data", text]
    assert forked(["heal", *arguments, *HEAL], root)[0] == "accepted", "healed"
    (root / "gguf").mkdir()
    write_gguf(root / "gguf")


@contextmanager
def bases() -> Iterator[Path]:
    """Give a temporary folder with what ``build_bases`` writes, and an empty folder ``runs``."""
    preload()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "runs").mkdir()
        build_bases(root)
        yield root


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
        return forked(command(case["verb"], folder, root), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def forked(arguments: list[str], folder: Path, stdin: bytes = b"") -> tuple[str, str]:
    """Run a command line in a forked process with ``folder`` as working folder; return outcome and output."""
    output = folder.parent / f"{folder.name}.output"
    child = os.fork()
    if child == 0:
        _child(arguments, folder, output, stdin)
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


def _child(arguments: list[str], folder: Path, output: Path, stdin: bytes) -> None:
    code = 70
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        given, end = os.pipe()
        os.write(end, stdin)
        os.close(end)
        for old, new in ((given, 0), (descriptor, 1), (descriptor, 2)):
            os.dup2(old, new)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
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
