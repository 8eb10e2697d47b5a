"""``bench``: the planned cache bytes, one point per batch and context, and the comparison with a baseline."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.graph_models import with_graphs
from helpers.mla_models import tiny
from typer.testing import CliRunner

import transmla
from transmla.cli.app import build
from transmla.cli.bench_report import show_bench
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.evaluate.bench import Bench, Point, bench, copy_bandwidth, measure
from transmla.recipe import Recipe
from transmla.reporter import Silent
from transmla.runtime.forms import RATES


def test_cache_bytes_are_those_of_the_latents() -> None:
    model = transmla.accelerate(tiny())
    result = bench(model, batches=[1, 3], contexts=[16, 40], steps=2, reporter=Silent())
    assert [(p.batch, p.context) for p in result.points] == [(1, 16), (1, 40), (3, 16), (3, 40)]
    per_token = (16 + 8) * 4 * model.config.num_hidden_layers
    assert [p.cache_bytes for p in result.points] == [p.batch * p.context * per_token for p in result.points]
    assert result.backend == "torch"
    assert all(p.step_seconds > 0 and p.prefill_seconds > 0 and p.bytes_per_second > 0 for p in result.points)


def test_a_model_without_mla_is_measured() -> None:
    result = bench(tiny(), batches=[1], contexts=[16], steps=2, reporter=Silent())
    assert result.backend == "transformers"
    assert json.loads(json.dumps(result.to_dict()))["points"][0]["context"] == 16


def test_tokens_per_second_counts_the_whole_batch() -> None:
    assert Point(8, 16, 0.1, 0.5, 0, 0.0).tokens_per_second == 16


def test_several_new_tokens_are_measured_as_one_step() -> None:
    result = bench(
        transmla.accelerate(tiny()), batches=[2], contexts=[16], new_tokens=[1, 4], steps=2, reporter=Silent()
    )
    assert [p.new_tokens for p in result.points] == [1, 4]
    assert result.points[1].tokens_per_second == pytest.approx(8 / result.points[1].step_seconds)


def test_a_point_says_how_its_steps_ran() -> None:
    model = transmla.accelerate(tiny())
    assert measure(model, 1, 16, 2, 0.0).way == "eager"
    graphs = with_graphs(model)
    assert measure(model, 1, 16, 2, 0.0).way == "graph"
    assert graphs.replays > 2
    assert measure(model, 1, 16, 2, 0.0, static=True).way == "compiled"


def test_a_point_says_which_form_its_steps_took(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RATES, "cpu", replace(RATES["cpu"], most=3))
    model = transmla.accelerate(tiny())
    with_graphs(model)
    result = bench(model, batches=[1], contexts=[16], new_tokens=[1, 3, 4], steps=2, reporter=Silent())
    assert [p["form"] for p in result.to_dict()["points"]] == ["absorbed", "absorbed", "expanded"]
    show_bench({"model": result})
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 tokens a step, absorbed form" in shown
    assert "4 tokens a step, expanded form" in shown
    # Points of one table have a column only if they differ.
    first, _, last = result.points
    show_bench({"model": replace(result, points=[first, replace(last, new_tokens=1, way="graph")])})
    shown = " ".join(capsys.readouterr().out.split())
    assert "absorbed form" not in shown
    assert "absorbed" in shown
    assert "expanded" in shown
    assert measure(model, 1, 16, 2, 0.0, static=True).form == "absorbed"
    assert measure(tiny(), 1, 16, 2, 0.0).form is None


def test_a_step_that_grows_the_cache_does_not_change_the_way() -> None:
    """The buffer of 32 sequences has room for 300 rows more. The step that grows it is eager."""
    model = transmla.accelerate(tiny())
    graphs = with_graphs(model)
    assert measure(model, 32, 16, 90, 0.0, new=4).way == "graph"
    assert graphs.captures > 1


def test_the_table_has_a_part_for_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    def point(way: str, seconds: float, **more: Any) -> Point:
        return Point(8, 1024, 0.1, seconds, 10**9, 1e12, way=way, **more)

    ours = [point("compiled", 0.1), point("graph", 0.2), point("eager", 0.4, new_tokens=4, reason="modules have hooks")]
    theirs = [point("compiled", 0.2), point("eager", 0.8)]
    show_bench({role: Bench("cuda:0", "bfloat16", "hopper", 4e12, found) for role, found in
                (("model", ours), ("baseline", theirs))})  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert "hopper, compiled" in shown
    assert "hopper, plain generate() from CUDA graphs" in shown
    assert "4 tokens a step" in shown
    assert "steps ran eagerly, not from a CUDA graph: modules have hooks" in shown
    assert shown.count("2.00") == 1
    assert shown.count("4.00") == 1


def test_a_context_that_is_too_long_is_refused() -> None:
    says = r"context 512 is too long.*: 2 steps, and 3 before the timing, decode 5 more"
    with pytest.raises(TransmlaError, match=says):
        bench(tiny(), batches=[1], contexts=[16, 512], steps=2, reporter=Silent())


def test_a_point_that_runs_out_of_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transmla.evaluate import bench as module

    original_measure = module.measure

    def measure_small_batches(model: object, batch: int, *args: Any, **kwargs: Any) -> Point:
        if batch > 1:
            raise torch.OutOfMemoryError
        return original_measure(model, batch, *args, **kwargs)

    monkeypatch.setattr(module, "measure", measure_small_batches)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    result = bench(tiny(), batches=[1, 2], contexts=[16], steps=2, reporter=Silent())
    assert [p.batch for p in result.points] == [1]
    with pytest.raises(TransmlaError, match="nothing was measured"):
        bench(tiny(), batches=[2], contexts=[16], steps=2, reporter=Silent())


def test_copy_bandwidth_is_plausible() -> None:
    assert 1e8 < copy_bandwidth(torch.device("cpu")) < 1e13


def test_bench_command_compares_an_export_with_its_source(
    make_source: Callable[..., Path], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    source = make_source()
    folder = convert(make_recipe(source, cache_ratio=0.5))
    settings = ["--baseline", str(source), "--batch", "1", "--batch", "2", "--context", "32", "--steps", "2"]
    shown = CliRunner().invoke(build(), ["bench", str(folder), *settings, "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "ratio" in shown.stdout
    figure = tmp_path / "speed.png"
    printed = CliRunner().invoke(
        build(), ["bench", str(folder), *settings, "--device", "cpu", "--json", "--plot", str(figure)]
    )
    results = json.loads(printed.stdout)
    sizes = [results[role]["points"][0]["cache_bytes"] for role in ("model", "baseline")]
    assert sizes[0] * 2 == sizes[1]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_bench_command_refuses_a_model_without_mla(make_source: Callable[..., Path]) -> None:
    refused = CliRunner().invoke(build(), ["bench", str(make_source()), "--device", "cpu"])
    assert isinstance(refused.exception, TransmlaError)
    assert "no MLA layer" in str(refused.exception)


def test_scripts_decode_bench(tmp_path: Path) -> None:
    """``scripts/decode_bench.py`` measures tiny models with random weights, without compilation."""
    script = Path(__file__).parents[2] / "scripts" / "decode_bench.py"
    command = [sys.executable, str(script), "tiny", "--shape", "32+16", "--roles", "growing", "dynamic"]
    settings = ["--batch", "2", "--context", "64", "--steps", "1", "--device", "cpu", "--commit", "none"]
    subprocess.run([*command, *settings, "--result", str(tmp_path / "result.json")], check=True, capture_output=True)
    ours, source = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert (ours["role"], source["role"]) == ("growing", "dynamic")
    assert ours["tokens/s"] > 0 < source["tokens/s"]
