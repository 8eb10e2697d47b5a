"""scripts/throughput.py gives source and conversion the same memory, and measures both."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_source_and_conversion_are_measured_at_equal_memory(
    load_script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    script, result = load_script("throughput"), tmp_path / "result.json"
    options = ["--backend", "transformers", "--memory", "0.006", "--reserve", "0.001", "--steps", "2"]
    files = ["--work", str(tmp_path / "work"), "--result", str(result), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", "tiny", "--contexts", "32", "64", *options, *files])
    script.main()
    rows = json.loads(result.read_text())["rows"]
    assert [(row["role"], row["N"]) for row in rows] == [(r, n) for r in ("source", "export") for n in (32, 64)]
    for row in rows:
        job = json.loads((tmp_path / "work" / "tiny" / row["role"] / "job.json").read_text())
        assert job["weight_bytes"] + job["cache_bytes"] == 5_000_000
        assert row["batch"] == job["cache_bytes"] // (2 * row["N"] * row["cache bytes a token"])
        assert row["N-in N-out tokens/s"] < row["decode tokens/s"]
    source, export = rows[1], rows[3]
    assert export["cache bytes a token"] * 2 == source["cache bytes a token"]
    assert export["batch"] > 1.5 * source["batch"]
    assert "| tiny | 64 |" in capsys.readouterr().out


def test_a_process_that_fails_leaves_its_log(
    load_script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = load_script("throughput")
    job = {"model": "none", "role": "source", "folder": str(tmp_path), "backend": "unknown"}
    assert list(script.run(job, 60)) == []
    assert "none source: failed" in capsys.readouterr().out
    assert "KeyError" in (tmp_path / "log.txt").read_text()


def test_only_steps_of_the_whole_batch_count(load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("throughput_run")
    stamps = [(1.0, 2), (2.0, 4), (2.5, 4), (3.0, 4), (3.5, 4), (9.0, 4), (9.1, 1)]
    assert script.steady_step(stamps, 4) == pytest.approx(0.5)
    with pytest.raises(RuntimeError, match="--steps"):
        script.steady_step(stamps, 8)


def test_vllm_captures_graphs_of_the_batches_that_are_measured(load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("throughput_run")
    job = {"folder": "model", "mode": "graphs", "batched_tokens": 64, "cache_bytes": 1000}
    options = script.vllm_options(job | {"points": [{"N": 32, "batch": 20}, {"N": 128, "batch": 5}]})
    assert options["compilation_config"]["cudagraph_capture_sizes"] == [5, 20]
    assert (options["max_num_seqs"], options["max_model_len"]) == (20, 256)
    assert options["kv_cache_memory_bytes"] == 1000
