"""The bench measures what it says: bytes as planned, every point, and a baseline beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.mla_models import tiny
from typer.testing import CliRunner

import transmla
from transmla.cli.app import build
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.evaluate.bench import Point, bench, copy_bandwidth
from transmla.recipe import Recipe
from transmla.reporter import Silent


def test_cache_bytes_are_the_latents() -> None:
    model = transmla.accelerate(tiny())
    found = bench(model, batches=[1, 3], contexts=[16, 40], steps=2, reporter=Silent())
    assert [(p.batch, p.context) for p in found.points] == [(1, 16), (1, 40), (3, 16), (3, 40)]
    per_token = (16 + 8) * 4 * model.config.num_hidden_layers
    assert [p.cache_bytes for p in found.points] == [p.batch * p.context * per_token for p in found.points]
    assert found.backend == "torch"
    assert all(p.step_seconds > 0 and p.prefill_seconds > 0 and p.bytes_per_second > 0 for p in found.points)


def test_a_model_as_transformers_runs_it() -> None:
    found = bench(tiny(), batches=[1], contexts=[16], steps=2, reporter=Silent())
    assert found.backend == "transformers"
    assert json.loads(json.dumps(found.to_dict()))["points"][0]["context"] == 16


def test_tokens_per_second_count_the_whole_batch() -> None:
    assert Point(8, 16, 0.1, 0.5, 0, 0.0).tokens_per_second == 16


def test_too_long_a_context_is_refused_before_anything_runs() -> None:
    with pytest.raises(TransmlaError, match="context 512 is too long"):
        bench(tiny(), batches=[1], contexts=[16, 512], steps=2, reporter=Silent())


def test_a_point_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transmla.evaluate import bench as module

    real = module.measure

    def small(model: object, batch: int, context: int, steps: int, prefill: float) -> Point:
        if batch > 1:
            raise torch.OutOfMemoryError
        return real(model, batch, context, steps, prefill)

    monkeypatch.setattr(module, "measure", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = bench(tiny(), batches=[1, 2], contexts=[16], steps=2, reporter=Silent())
    assert [p.batch for p in found.points] == [1]
    with pytest.raises(TransmlaError, match="nothing was measured"):
        bench(tiny(), batches=[2], contexts=[16], steps=2, reporter=Silent())


def test_copying_takes_time() -> None:
    assert 1e8 < copy_bandwidth(torch.device("cpu")) < 1e13


def test_the_command_compares_an_export_with_its_source(
    make_source: Callable[..., Path], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    source = make_source()
    folder = convert(make_recipe(source, cache_ratio=0.5))
    settings = ["--baseline", str(source), "--batch", "1", "--batch", "2", "--context", "32", "--steps", "2"]
    shown = CliRunner().invoke(build(), ["bench", str(folder), *settings, "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "ratio" in shown.stdout
    picture = tmp_path / "speed.png"
    told = CliRunner().invoke(
        build(), ["bench", str(folder), *settings, "--device", "cpu", "--json", "--plot", str(picture)]
    )
    found = json.loads(told.stdout)
    sizes = [found[role]["points"][0]["cache_bytes"] for role in ("model", "baseline")]
    assert sizes[0] * 2 == sizes[1]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_without_mla_is_refused(make_source: Callable[..., Path]) -> None:
    refused = CliRunner().invoke(build(), ["bench", str(make_source()), "--device", "cpu"])
    assert isinstance(refused.exception, TransmlaError)
    assert "no MLA layer" in str(refused.exception)


def test_the_script_measures_whole_models_of_random_weights(tmp_path: Path) -> None:
    """scripts/decode_bench.py, uncompiled and tiny."""
    script = Path(__file__).parents[2] / "scripts" / "decode_bench.py"
    command = [sys.executable, str(script), "tiny", "--shape", "32+16", "--roles", "growing", "dynamic"]
    settings = ["--batch", "2", "--context", "64", "--steps", "1", "--device", "cpu", "--commit", "none"]
    subprocess.run([*command, *settings, "--result", str(tmp_path / "found.json")], check=True, capture_output=True)
    ours, source = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert (ours["role"], source["role"]) == ("growing", "dynamic")
    assert ours["tokens/s"] > 0 < source["tokens/s"]
