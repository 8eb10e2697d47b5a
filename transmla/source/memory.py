"""Free memory of the computer and of a GPU, within the limits that a container sets."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
# Names of a cgroup's files, by version: its limit, its memory in use, and its statistics.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
    2: ("memory.max", "memory.current", "memory.stat"),
}


def free_memory() -> int:
    """Return the bytes of the computer's memory that this process may still take, within its cgroups and ulimits."""
    return min([psutil.virtual_memory().available, *_free_in_cgroups(), *_free_in_limits()])


def free_memory_of(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that this process may still take; of a CPU, the same as ``free_memory``."""
    if device.type != "cuda":
        return free_memory()
    # What an earlier run in this process has left reserved is free for the next.
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def resident_memory() -> int:
    """Return the bytes of memory that this process holds."""
    return int(psutil.Process().memory_info().rss)


def _free_in_limits() -> list[int]:
    """Return the free bytes below the limits of this process's address space and data; empty if there are none."""
    if not hasattr(psutil, "RLIMIT_AS"):  # other systems than Linux
        return []
    process = psutil.Process()
    memory = process.memory_info()
    limits = {psutil.RLIMIT_AS: memory.vms, psutil.RLIMIT_DATA: memory.data}
    soft = {kind: process.rlimit(kind)[0] for kind in limits}
    return [max(0, soft[kind] - used) for kind, used in limits.items() if soft[kind] != psutil.RLIM_INFINITY]


def _free_in_cgroups() -> list[int]:
    """Return the free bytes of every cgroup with a limit that this process is in; empty on other systems than Linux."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            version, root = 1, CGROUPS / "memory"
        elif not controllers:
            version, root = 2, CGROUPS
        else:
            continue
        # A limit of any group above holds too. Inside a container, the group's own path may not exist.
        group = root / path.lstrip("/")
        free += [_free_in(folder, version) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return [size for size in free if size is not None]


def _free_in(folder: Path, version: int) -> int | None:
    """Return the free bytes of one cgroup; None if it sets no limit. Pages of files count as free: Linux drops them."""
    limit, usage, statistics = _FILES[version]
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        numbers = dict(line.split() for line in (folder / statistics).read_text().splitlines())
    except (OSError, ValueError):  # no such file, or "max"
        return None
    prefix = "total_" if version == 1 else ""
    files = sum(int(numbers.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return max(0, most - used + files)
