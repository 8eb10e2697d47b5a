"""``transmla inspect``: its numbers describe the layer correctly, and its reports can be opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_layer import LAYOUTS, make_layer, measure
from safetensors.torch import load_file, save_file

from transmla import cli
from transmla.artifacts import LayerWeights
from transmla.cli import inspect_report
from transmla.core.linalg import regularise
from transmla.core.rope import to_complex
from transmla.core.spectrum import spectrum
from transmla.source.checkpoint import Checkpoint

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shares_of_energy_lie_between_0_and_1(layout: str) -> None:
    layer = make_layer(layout)
    result = spectrum(layer.weights, layer.stats, layer.spec)
    assert float(result.joint.sum()) == pytest.approx(1, abs=1e-6)
    assert bool((result.joint.diff() <= 1e-12).all())
    assert float(result.rotary.sum()) == pytest.approx(1)
    assert bool((result.one_head <= result.shared + 1e-9).all())
    assert bool(((result.phase > 0) & (result.phase <= 1 + 1e-9)).all())
    if layer.spec.num_key_value_heads == 1:
        assert result.shared.tolist() == pytest.approx([1.0] * len(result.shared))


def test_rank_for_counts_the_input_directions_in_use() -> None:
    """The keys and values depend on three input directions only."""
    layer = make_layer("gqa")
    few = torch.zeros(layer.x.shape[-1], layer.x.shape[-1], dtype=torch.float64)
    few[:3, :3] = torch.eye(3)
    w = layer.weights
    result = spectrum(LayerWeights(w.q, w.k @ few, w.v @ few, w.o), layer.stats, layer.spec)
    assert result.rank_for(1 - 1e-9) == 3
    assert 1 <= result.rank_for(0.5) <= 3


def test_the_shared_channel_holds_more_energy_than_any_random_mixture() -> None:
    layer = make_layer("gqa")
    result = spectrum(layer.weights, layer.stats, layer.spec)
    kappa, query = to_complex(layer.weights.k), to_complex(layer.weights.q)
    attended = regularise(layer.stats.attended_moment).to(kappa.dtype)
    moment = regularise(layer.stats.second_moment).to(kappa.dtype)
    weight = ((query @ moment) * query.conj()).sum(-1).real.view(3, 2, -1).sum(1).sqrt()
    generator = torch.Generator().manual_seed(0)
    for f in range(kappa.shape[1]):
        keys = weight[:, f, None] * kappa[:, f]
        covariance = keys @ attended @ keys.mH
        for _ in range(50):
            mix = torch.randn(3, dtype=torch.complex128, generator=generator)
            held = (mix.conj() @ covariance @ mix).real / mix.norm() ** 2 / covariance.trace().real
            assert float(held) <= float(result.shared[f]) + 1e-9


def test_a_head_that_attends_to_one_distance_has_phase_share_one() -> None:
    layer = make_layer("mqa")
    mass = torch.zeros_like(layer.stats.distance_mass)
    mass[:, 1] = 1
    result = spectrum(layer.weights, replace(measure(layer.x, mass), distance_mass=mass), layer.spec)
    assert result.phase.tolist() == pytest.approx([1.0] * len(result.phase))


@pytest.fixture
def inspect(
    make_source: Callable[..., Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """``inspect(*options)`` on a tiny source in the working directory → (exit code, stdout, stderr)."""
    monkeypatch.chdir(make_source("llama", "gqa", num_hidden_layers=3).parent)
    monkeypatch.setenv("COLUMNS", "160")
    calibration = ["--calibration", str(text_file), "--calibration-sequences", "4", "--calibration-length", "48"]

    def call(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["transmla", "inspect", "source", *calibration, *options])
        capsys.readouterr()  # discard the output of libraries while the source was built
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


def test_reports_are_written_as_png_and_html(inspect: Run) -> None:
    code, out, err = inspect("--report", "report.png")
    assert code == 0, err
    assert "r 99 %" in out
    assert Path("report.png").read_bytes().startswith(b"\x89PNG")
    assert inspect("--report", "report.html")[0] == 0
    page = Path("report.html").read_text()
    assert "data:image/png;base64," in page
    assert "kv_lora_rank" in page


def test_json_holds_every_layer(inspect: Run) -> None:
    code, out, _ = inspect("--json")
    result = json.loads(out)
    assert code == 0
    assert len(result["layers"]) == 3
    assert result["budgets"]
    errors = [budget["mean_error"] for budget in result["budgets"]]
    assert all(0 < error < 2 for error in errors)
    assert errors == sorted(errors)


def test_layers_that_keep_the_sources_attention_have_no_error(inspect: Run) -> None:
    _, out, _ = inspect("--json", "--layers", "1")
    errors = [layer["errors"] for layer in json.loads(out)["layers"]]
    assert errors[0] == errors[2] == [0.0] * len(errors[1])
    assert min(errors[1]) > 0


def test_chosen_layers_are_measured_as_among_all_and_no_later_layer_is_read(
    inspect: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = inspect("--json", "--layers", "0-2")
    whole = json.loads(out)
    read, layer = [], Checkpoint.layer

    def record(self: Checkpoint, prefix: str) -> dict[str, torch.Tensor]:
        read.append(prefix)
        return layer(self, prefix)

    monkeypatch.setattr(Checkpoint, "layer", record)
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda _: pytest.fail("all weights were read"))
    _, out, _ = inspect("--json", "--layers", "1")
    chosen = json.loads(out)
    assert chosen["layers"][1] == whole["layers"][1]
    assert [layer["kept"] for layer in chosen["layers"]] == [True, False, True]
    assert [budget["mean_error"] for budget in chosen["budgets"]] == whole["layers"][1]["errors"]
    assert read == ["model.layers.0.", "model.layers.1."]


def test_the_tables_and_reports_show_the_chosen_layers(inspect: Run) -> None:
    code, out, err = inspect("--layers", "0,2", "--report", "report.html")
    assert code == 0, err
    assert "mean error by budget, 2 of 3 layers" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("│ ")][:2] == ["0", "2"]


def test_the_picture_of_phases_names_the_chosen_layers(inspect: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    draw = inspect_report._draw
    monkeypatch.setattr(inspect_report, "_draw", lambda found: figures.append(draw(found)) or figures[0])
    for chosen, names in (("0,2", ["0", "2"]), ("2", ["2"])):
        figures.clear()
        assert inspect("--layers", chosen, "--report", "report.png")[0] == 0
        (phases,) = (axes for axes in figures[0].axes if axes.get_title().startswith("phase"))
        assert [label.get_text() for label in phases.get_yticklabels()] == names


def test_a_layer_that_runs_is_checked(inspect: Run) -> None:
    tensors = load_file("source/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, "source/model.safetensors", metadata={"format": "pt"})
    for options in ([], ["--layers", "2"]):
        code, _, err = inspect(*options)
        assert code == 2
        assert "tensor 'model.layers.1.mlp.up_proj.weight' holds NaN or Inf" in " ".join(err.split())
    assert inspect("--layers", "0")[0] == 0


@pytest.mark.parametrize(("report", "says"), [("report.pdf", ".png or .html"), ("nowhere/report.png", "no folder")])
def test_a_bad_report_is_refused_before_anything_is_read(inspect: Run, report: str, says: str) -> None:
    Path("source/model.safetensors").unlink()
    code, out, err = inspect("--report", report)
    assert (code, out) == (2, "")
    assert says in err
