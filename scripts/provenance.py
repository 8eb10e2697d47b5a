"""Provenance of a measurement (device, versions, commit, command), result files, and peak memory."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# Folder of the recorded results, one subfolder for each script. README.md there is the index.
RESULTS = Path(__file__).parent / "results"


def provenance(commit: str | None = None) -> dict[str, Any]:
    """Return device, commit, command and versions of this run.

    Args:
        commit: the commit to record, for a copy of the tree without git history. None asks git.
    """
    if commit is None:
        folder = Path(__file__).parent
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=folder, text=True).strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def write_result(path: Path, rows: list[dict[str, Any]], commit: str | None) -> None:
    """Write ``rows`` and the provenance of this run to the JSON file ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"provenance": provenance(commit), "rows": rows}, indent=2) + "\n")
    print(f"wrote {path}")


def reset_peak(device: torch.device) -> None:
    """Reset the counter that ``peak_bytes`` reads: torch's on a GPU, Linux's for this process on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Return the largest memory in bytes since ``reset_peak``: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
