"""What ``transmla inspect`` says of a layer is true of it, and can be looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.random_layer import LAYOUTS, make_layer, measure

from transmla import cli
from transmla.artifacts import LayerWeights
from transmla.core.linalg import regularise
from transmla.core.rope import to_complex
from transmla.core.spectrum import spectrum

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shares_are_shares(layout: str) -> None:
    layer = make_layer(layout)
    found = spectrum(layer.weights, layer.stats, layer.spec)
    assert float(found.joint.sum()) == pytest.approx(1, abs=1e-6)
    assert bool((found.joint.diff() <= 1e-12).all())
    assert float(found.rotary.sum()) == pytest.approx(1)
    assert bool((found.one_head <= found.shared + 1e-9).all())
    assert bool(((found.phase > 0) & (found.phase <= 1 + 1e-9)).all())
    if layer.spec.num_key_value_heads == 1:
        assert found.shared.tolist() == pytest.approx([1.0] * len(found.shared))


def test_rank_for_counts_the_directions_that_are_there() -> None:
    """Keys and values that depend on three directions of the input alone."""
    layer = make_layer("gqa")
    few = torch.zeros(layer.x.shape[-1], layer.x.shape[-1], dtype=torch.float64)
    few[:3, :3] = torch.eye(3)
    w = layer.weights
    found = spectrum(LayerWeights(w.q, w.k @ few, w.v @ few, w.o), layer.stats, layer.spec)
    assert found.rank_for(1 - 1e-9) == 3
    assert 1 <= found.rank_for(0.5) <= 3


def test_the_shared_channel_beats_every_random_mixture() -> None:
    layer = make_layer("gqa")
    found = spectrum(layer.weights, layer.stats, layer.spec)
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
            assert float(held) <= float(found.shared[f]) + 1e-9


def test_a_head_that_looks_one_token_back_needs_no_rotation() -> None:
    layer = make_layer("mqa")
    mass = torch.zeros_like(layer.stats.distance_mass)
    mass[:, 1] = 1
    found = spectrum(layer.weights, replace(measure(layer.x, mass), distance_mass=mass), layer.spec)
    assert found.phase.tolist() == pytest.approx([1.0] * len(found.phase))


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
        capsys.readouterr()  # what libraries said while the source was made
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


def test_the_report_can_be_looked_at(inspect: Run) -> None:
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
    found = json.loads(out)
    assert code == 0
    assert len(found["layers"]) == 3
    assert found["budgets"]
    errors = [budget["mean_error"] for budget in found["budgets"]]
    assert all(0 < error < 2 for error in errors)
    assert errors == sorted(errors)


def test_layers_that_are_kept_have_no_error(inspect: Run) -> None:
    _, out, _ = inspect("--json", "--layers", "1")
    errors = [layer["errors"] for layer in json.loads(out)["layers"]]
    assert errors[0] == errors[2] == [0.0] * len(errors[1])
    assert min(errors[1]) > 0


@pytest.mark.parametrize(("report", "says"), [("report.pdf", ".png or .html"), ("nowhere/report.png", "no folder")])
def test_a_bad_report_is_refused_before_anything_is_read(inspect: Run, report: str, says: str) -> None:
    Path("source/model.safetensors").unlink()
    code, out, err = inspect("--report", report)
    assert (code, out) == (2, "")
    assert says in err
