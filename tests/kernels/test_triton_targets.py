"""The portable kernel compiles for GPUs of other makes and ages, within their shared memory. Nothing runs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from transmla.kernels import triton_decode

KIB = 1024
# Backend, architecture, threads of a warp; and bytes of shared memory that one program may use.
TARGETS = {
    "A100": (["cuda", 80, 32], 163 * KIB),
    "RTX 30": (["cuda", 86, 32], 99 * KIB),
    "Ada": (["cuda", 89, 32], 99 * KIB),
    "H100, H200": (["cuda", 90, 32], 227 * KIB),
    "B200": (["cuda", 100, 32], 227 * KIB),
    "RTX 50": (["cuda", 120, 32], 99 * KIB),
    "MI200": (["hip", "gfx90a", 64], 64 * KIB),
    "MI300": (["hip", "gfx942", 64], 64 * KIB),
}
# Query rows, rank, width of the rotary key, dtype.
SHAPES = [(128, 512, 64, "bf16"), (16, 512, 64, "bf16"), (64, 256, 64, "bf16"), (64, 96, 32, "fp16")]
SHAPES += [(16, 512, 64, "fp32")]


@pytest.mark.skipif(triton_decode.triton is None, reason="needs triton")
@pytest.mark.parametrize("name", TARGETS)
def test_tiles_fit_the_shared_memory(name: str) -> None:
    target, limit = TARGETS[name]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    cases = json.dumps([[target, limit, *shape] for shape in SHAPES])
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "compile_triton.py"), cases]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in process.stdout.splitlines() if line.startswith("[")]
    assert lines, process.stderr[-2000:]
    assert all(0 < size <= limit for size in json.loads(lines[-1]))
