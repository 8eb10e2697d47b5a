"""The Hopper kernel fits its GPU: tested by compiling, which needs none. What it computes is tested on one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from transmla.kernels import DecodeShape, hopper

# What a program may hold of a multiprocessor's shared memory.
SHARED_BYTES = 227 * 1024
CASES = [
    {"rank": 512, "width": 64, "dtype": "bf16", "new": 1, "page": 0, "masked": False},
    {"rank": 448, "width": 64, "dtype": "fp16", "new": 4, "page": 0, "masked": True},
    {"rank": 256, "width": 32, "dtype": "bf16", "new": 1, "page": 64, "masked": False},
    {"rank": 96, "width": 32, "dtype": "bf16", "new": 1, "page": 0, "masked": True},
    {"rank": 16, "width": 8, "dtype": "bf16", "new": 2, "page": 0, "masked": False},
]


@pytest.mark.skipif(hopper.gluon is None, reason="needs triton >= 3.6")
def test_every_specialisation_fits_a_multiprocessor_and_keeps_its_products_asynchronous() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "compile_hopper.py"), json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for case, kernel in zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert kernel["shared"] <= SHARED_BYTES, case
        assert "serialized" not in kernel["said"], (case, kernel["said"])
        assert "setmaxnreg" not in kernel["said"], (case, kernel["said"])
        spilled = int(re.findall(r"(\d+) bytes spill stores", kernel["said"])[-1])
        # Triton 3.9 spills two words of the widest rows outside the loops; 3.6 none.
        assert spilled <= 16, case


@pytest.mark.skipif(hopper.gluon is None, reason="needs triton >= 3.6")
@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        ({}, (9, 0), None),
        ({}, (8, 0), "Hopper"),
        ({"device": torch.device("cpu")}, (9, 0), "Hopper"),
        ({"dtype": torch.float32}, (9, 0), "float32"),
        ({"kv_lora_rank": 520}, (9, 0), "kv_lora_rank 520"),
        ({"kv_lora_rank": 100}, (9, 0), "kv_lora_rank 100"),
        ({"qk_rope_head_dim": 128}, (9, 0), "qk_rope_head_dim 128"),
    ],
    ids=str,
)
def test_what_it_cannot_serve_it_refuses(
    change: dict[str, object], capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    shape = DecodeShape(8, 512, 64, torch.bfloat16, torch.device("cuda"))
    said = hopper.refuses(replace(shape, **change))
    assert said is None if reason is None else reason in (said or "")
