"""Where a number comes from: device, versions, commit, command."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def provenance(commit: str | None = None) -> dict[str, Any]:
    """``commit`` is asked of git unless given (for a copy of the tree without history)."""
    if commit is None:
        here = Path(__file__).parent
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=here, text=True).strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def write_result(path: Path, rows: list[dict[str, Any]], commit: str | None) -> None:
    """Write rows under their provenance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"provenance": provenance(commit), "rows": rows}, indent=2) + "\n")
    print(f"wrote {path}")


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of ``peak_bytes`` (on a CPU of this process, by Linux's own counter)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Largest memory since ``reset_peak``: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
