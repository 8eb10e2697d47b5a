"""scripts/prefill_bench.py compares conversions with the fastest way to run their source."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_source_and_conversion_read_prompts(
    load_script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    script, result = load_script("prefill_bench"), tmp_path / "result.json"
    options = ["--shape", "32+16", "--layers", "1", "--lengths", "64", "32", "--repeats", "1", "--device", "cpu"]
    ways = ["--attention", "sdpa", "none_such", "--backend", "torch", "--kernels"]
    arguments = ["prefill_bench.py", "tiny", *options, *ways, "--result", str(result), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    rows = json.loads(result.read_text())["rows"]
    models = [row for row in rows if "role" in row]
    assert [(row["role"], row["length"]) for row in models] == [(r, n) for r in ("source", "export") for n in (32, 64)]
    assert all(row["layers"] == 1 and row["first s"] > 0 < row["s"] for row in models)
    assert all(("slower %" in row) == (row["role"] == "export") for row in models)
    alone = [row for row in rows if "kernel" in row]
    forms = {"source", "padded", "conversion", "padded view", "one buffer", "expansion"}
    assert {row["form"] for row in alone} == forms
    assert {row["kernel"] for row in alone if row["form"] == "expansion"} == {"one buffer", "joined and padded"}
    assert all(row["served"] == "flash" for row in models)
    # A way that transformers cannot use is left out.
    assert "tiny source none_such:" in capsys.readouterr().out


def test_the_fastest_source_counts(load_script: Callable[[str], ModuleType]) -> None:
    rows = [
        {"model": "a", "role": "source", "attention": "sdpa", "length": 8, "s": 2.0},
        {"model": "a", "role": "source", "attention": "sdpa:cudnn", "length": 8, "s": 1.0},
        {"model": "a", "role": "source", "attention": "sdpa", "length": 16, "s": 0.1},
        {"model": "a", "role": "export", "length": 8, "s": 1.1},
    ]
    load_script("prefill_bench").compare(rows)
    assert rows[3]["slower %"] == 10.0
    assert rows[3]["than sdpa %"] == -45.0


def test_a_forced_kernel_is_left_out_where_it_cannot_attend(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script, result = load_script("prefill_bench"), tmp_path / "result.json"
    options = ["--shape", "32+16", "--layers", "1", "--lengths", "32", "--repeats", "1", "--device", "cpu"]
    ways = ["--attention", "sdpa:flash", "sdpa:cudnn", "--backend", "torch", "--result", str(result), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["prefill_bench.py", "tiny", *options, *ways])
    script.main()
    rows = json.loads(result.read_text())["rows"]
    # cuDNN attends on GPUs alone.
    assert [row["attention"] for row in rows] == ["sdpa:flash", "latent_attention"]
