"""Run a GGUF file in llama.cpp and compare it with the export in transformers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from transmla.errors import TransmlaError
from transmla.reporter import Reporter
from transmla.source.load import load_model

# The text that both tokenise, with numbers, line feeds, accents and other scripts; the model continues its beginning.
TEXT = "The river rises in the hills above the town, and its water"
SAMPLE = f"{TEXT} doesn't freeze before 1,500 m.\n\n  It's été; 12 34567 в 你好 (x_1 == 2)!\n"
# Tokens that are compared.
STEPS = 16
# Candidates that llama.cpp reports for each token. A token that is not among them gets the last one's log-prob.
CANDIDATES = 200
# Largest mean difference in log-prob, by type of file: about five times what sound files of a 135M model show. A file
# whose blocks have lost their scales differs by several nats.
LIMITS = {"f32": 0.02, "bf16": 0.1, "f16": 0.1, "q8_0": 0.3, "q4_k_m": 1.0}
# Memory of the reference in float32, as a multiple of the export's bytes in bfloat16.
GROWTH = 2.2


@dataclass(frozen=True)
class GgufCheck:
    """The comparison of a file with its export, over the export's own greedy tokens.

    Attributes:
        tokens: number of tokens compared.
        equal: number of these that are llama.cpp's most likely token too.
        mean: mean absolute difference in log-prob.
        largest: largest absolute difference in log-prob.
    """

    tokens: int
    equal: int
    mean: float
    largest: float


def refuse_check(size: int) -> str:
    """Return why a file cannot be run here; empty if it can. ``size``: bytes of the export's weights."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "llama.cpp is not installed (pip install xllamacpp)"
    available = psutil.virtual_memory().available
    if available < GROWTH * size:
        return f"the comparison needs {GROWTH * size / 1e9:.0f} GB of memory, and {available / 1e9:.0f} GB are free"
    return ""


def check_file(folder: Path, file: Path, tokenizer: Any, file_type: str, reporter: Reporter) -> GgufCheck:
    """Compare a GGUF file in llama.cpp with its export in transformers, both on the CPU.

    Args:
        folder: folder of the export.
        file: the GGUF file.
        tokenizer: the export's tokenizer.
        file_type: key of ``LIMITS``.
        reporter: receives the progress.

    Raises:
        TransmlaError: if llama.cpp cannot load the file, tokenises a text otherwise, or computes other log-probs.
    """
    reporter.stage("compare with transformers", 2)
    prompt = tokenizer(TEXT)["input_ids"]
    chosen, expected = _reference(folder, prompt)
    reporter.advance(1)
    found = run_file(file, {"text": SAMPLE, "prompt": prompt, "chosen": chosen, "candidates": CANDIDATES})
    reporter.advance(2)
    if found["text"] != tokenizer(SAMPLE)["input_ids"]:
        raise _failure("llama.cpp splits a text into other tokens than transformers", file_type)
    differences = [abs(a - b) for a, b in zip(found["log_probs"], expected, strict=True)]
    equal = sum(a == b for a, b in zip(found["best"], chosen, strict=True))
    result = GgufCheck(len(chosen), equal, sum(differences) / len(differences), max(differences))
    if not result.mean <= LIMITS[file_type]:
        limit = f"the log-probs of {STEPS} tokens differ by {result.mean:.2g} on average, {LIMITS[file_type]} allowed"
        raise _failure(limit, file_type)
    return result


@torch.no_grad()
def _reference(folder: Path, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Return the export's greedy tokens after ``prompt`` in float32, and their log-probs."""
    model = load_model(folder, dtype=torch.float32)
    tokens, chosen, log_probs = torch.tensor([prompt]), [], []
    for _ in range(STEPS):
        last = model(tokens, use_cache=False).logits[0, -1].log_softmax(-1)
        best = int(last.argmax())
        chosen.append(best)
        log_probs.append(float(last[best]))
        tokens = torch.cat([tokens, torch.tensor([[best]])], 1)
    return chosen, log_probs


def run_file(file: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Run ``llama_cpp_run`` in another process, which llama.cpp may abort, and return its answer.

    Raises:
        TransmlaError: if the process fails.
    """
    command = [sys.executable, "-m", "transmla.serve.llama_cpp_run", str(file)]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, errors="replace")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        wrong = [line for line in words if "error" in line.lower() or "assert" in line.lower()]
        reason = (wrong or words or [f"it ended with code {done.returncode}"])[0]
        raise TransmlaError("llama.cpp cannot run the file", limit=reason, remedy="upgrade xllamacpp, or report this")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _failure(limit: str, file_type: str) -> TransmlaError:
    return TransmlaError(
        f"the {file_type} file computes something else than the export, and was deleted",
        limit=limit,
        remedy="write another --type, or use the export with transformers",
    )
