"""A fit never raises the error on held-out text, is reproducible, and handles degenerate layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_sources import build_model
from torch import Tensor

from transmla.artifacts import LayerFactors, Plan
from transmla.convert import fit_layers as fits
from transmla.convert.factorize import factorize
from transmla.convert.fit_layers import held_out, reconstruct
from transmla.convert.observe import observe
from transmla.convert.pipeline import convert
from transmla.convert.source_layer import SourceLayer
from transmla.errors import TransmlaError
from transmla.plan.fit_settings import FitSettings, choose_fit
from transmla.plan.make_plan import make_plan
from transmla.recipe import Recipe, parse_recipe, read_recipe
from transmla.source.describe import describe, empty_model, family_of

SHORT = FitSettings(steps=100, tokens=1024, rate=3e-3, through_mlp=False)
LENGTH = 32


class Case:
    """One layer of a tiny model, a plan at a third of the cache, and random hidden states that enter the layer."""

    def __init__(
        self,
        layout: str = "gqa",
        damage: Callable[[dict[str, Tensor]], None] | None = None,
        index: int = 0,
        device: str = "cpu",
        half: bool = False,
        **recipe: Any,
    ):
        model = build_model(layout=layout)
        config = model.config
        spec = describe(config)
        self.layer = SourceLayer(empty_model(config), family_of(config), spec, torch.device(device), half=half)
        tensors = {name: t.detach().clone() for name, t in model.model.layers[index].state_dict().items()}
        if damage:
            damage(tensors)
        self.layer.load(tensors, index)
        generator = torch.Generator().manual_seed(3)
        mix = torch.randn(spec.hidden_size, spec.hidden_size, generator=generator) / spec.hidden_size**0.5
        self.source = torch.randn(72, LENGTH, spec.hidden_size, generator=generator) @ mix
        self.converted = self.source + 0.1 * torch.randn(self.source.shape, generator=generator)
        values = {
            "source": "x",
            "output": "y",
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "allow_no_saving": True,
            **recipe,
        }
        self.plan: Plan = make_plan(spec, parse_recipe(values, "test"), "float32")

    def closed_form(self) -> LayerFactors:
        observations = observe(self.layer, self.source)
        return factorize(self.layer.weights(), observations.stats, self.plan)

    def fit(self, factors: LayerFactors, settings: FitSettings = SHORT, seed: int = 0) -> Any:
        return reconstruct([self.layer], [factors], self.source, self.converted, settings, seed=seed)


def held_out_error(case: Case, factors: LayerFactors) -> float:
    """Return the relative squared error on the held-out sequences, computed from the layer's outputs."""
    n = held_out(len(case.source))
    source, converted = case.source[-n:], case.converted[-n:]
    with torch.no_grad():
        expected, actual = (
            case.layer.run(s, f, through_mlp=False) for s, f in ((source, None), (converted, factors.to(torch.float32)))
        )
    energy = expected.square().mean(-1)
    error, added = ((t**2).mean(-1) / energy for t in (actual - expected, expected - source))
    # No token contributes more than 1.
    return float((error / (1 + error)).sum() / (added / (1 + added)).sum())


def tensors(f: LayerFactors) -> list[Tensor]:
    return [value for value in vars(f).values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("through_mlp", [False, True])
@pytest.mark.parametrize("layout", ["mha", "gqa9", "mqa"])
def test_a_fit_lowers_the_error_on_held_out_text(layout: str, through_mlp: bool) -> None:
    case = Case(layout)
    factors = case.closed_form()
    before = [t.clone() for t in tensors(factors)]
    fit = case.fit(factors, replace(SHORT, through_mlp=through_mlp, steps=2 * SHORT.steps))
    assert fit.after[0] < 0.95 * fit.before[0]
    assert all(torch.equal(a, b) for a, b in zip(tensors(factors), before, strict=True))


def test_layers_fitted_together_lower_their_summed_error() -> None:
    """Fitting two layers together changes both, and gives less error than fitting each alone."""
    case, after = Case(), Case(index=1)
    entering = observe(case.layer, case.source).hidden
    after.source = entering
    first, second = case.closed_form(), after.closed_form()
    fit = reconstruct([case.layer, after.layer], [first, second], case.source, case.converted, SHORT, seed=0)
    assert sum(fit.after) < 0.95 * sum(fit.before)
    assert all(not torch.equal(a.latent, b.latent) for a, b in zip(fit.factors, (first, second), strict=True))

    def follow(factors: LayerFactors) -> Tensor:
        return case.layer.run_stream(case.converted, factors.to(torch.float32))[1]

    alone = case.fit(first).factors[0]
    apart = reconstruct([after.layer], [second], entering, follow(alone), SHORT, seed=0)
    ended = reconstruct([after.layer], [fit.factors[1]], entering, follow(fit.factors[0]), SHORT, seed=0)
    assert ended.before[0] < apart.before[0]
    assert ended.after[0] < apart.after[0]


@pytest.mark.parametrize("rate", [0.0, 1e3, float("inf")])
def test_a_fit_that_does_not_help_is_discarded(rate: float) -> None:
    """Learning rates that change nothing, ruin the layer, or fill it with NaN."""
    case = Case()
    factors = case.closed_form()
    fit = case.fit(factors, replace(SHORT, rate=rate))
    if rate:
        assert fit.factors[0] is factors
        assert fit.after == fit.before
    else:  # the conversion to coordinates and back only rounds
        assert fit.after == pytest.approx(fit.before, rel=1e-4)


def test_a_failed_fit_is_tried_again_at_a_lower_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    case, real, rates = Case(), fits.descend, []

    def ruinous(problem: Any, parameters: Any, settings: FitSettings, seed: int) -> None:
        real(problem, parameters, settings, seed)
        if not rates:
            parameters.vector.data.mul_(100)
        rates.append(settings.rate)

    monkeypatch.setattr(fits, "descend", ruinous)
    fit = case.fit(case.closed_form())
    assert rates == [SHORT.rate, pytest.approx(SHORT.rate * fits.RETRY_RATE)]
    assert fit.after < fit.before


def test_equal_seeds_give_equal_bits() -> None:
    case = Case()
    factors = case.closed_form()
    first, again, other = (tensors(case.fit(factors, seed=seed).factors[0]) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tests the GPU's kernels")
@pytest.mark.parametrize("half", [False, True])
def test_equal_seeds_give_equal_bits_on_a_gpu(half: bool) -> None:
    case = Case(device="cuda", half=half)
    factors = case.closed_form()
    first, again = (tensors(case.fit(factors, replace(SHORT, through_mlp=True)).factors[0]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_compressed_queries_are_fitted_too() -> None:
    case = Case(q_lora_rank=12)
    factors = case.closed_form()
    fit = case.fit(factors)
    assert fit.after[0] < fit.before[0]
    assert fit.factors[0].q_latent is not None
    assert factors.q_latent is not None
    assert not torch.equal(fit.factors[0].q_latent, factors.q_latent)


def dead_head(t: dict[str, Tensor]) -> None:
    for name in ("q", "k", "v"):
        t[f"self_attn.{name}_proj.weight"][:8] = 0


def constant_channel(t: dict[str, Tensor]) -> None:
    t["self_attn.k_proj.weight"][3] = 0
    t["input_layernorm.weight"][2:] = 0


@pytest.mark.parametrize("damage", [dead_head, constant_channel])
def test_degenerate_layers_stay_finite(damage: Callable[[dict[str, Tensor]], None]) -> None:
    case = Case(damage=damage)
    fit = case.fit(case.closed_form())
    assert all(bool(t.isfinite().all()) for t in tensors(fit.factors[0]))
    error = held_out_error(case, fit.factors[0])
    assert error == pytest.approx(fit.after[0], rel=1e-3)
    assert error <= held_out_error(case, case.closed_form()) * 1.0001


def test_tokens_with_massive_activations_do_not_decide_the_fit() -> None:
    """A token whose error no layer can mend leaves the fit of all others nearly as it is."""

    def error_without_it(case: Case, factors: LayerFactors) -> float:
        n = held_out(len(case.source))
        source, converted = case.source[-n:], case.converted[-n:]
        with torch.no_grad():
            expected = case.layer.run(source, None, through_mlp=False)
            actual = case.layer.run(converted, factors.to(torch.float32), through_mlp=False)
        weight = 1 / expected.square().mean(-1, keepdim=True)
        error, added = (((t**2) * weight)[:, :-1].sum() for t in (actual - expected, expected - source))
        return float(error / added)

    plain, massive = Case(), Case()
    # Attention is causal, so no other token sees the last one.
    massive.converted[:, -1, 0] += 1000
    factors = plain.closed_form()
    before = error_without_it(plain, factors)
    gains = [before - error_without_it(case, case.fit(factors).factors[0]) for case in (plain, massive)]
    assert gains[0] > 0
    assert gains[1] > 0.7 * gains[0]


def test_an_input_of_rank_one_stays_finite() -> None:
    case = Case()
    case.source = case.source[..., :1] * torch.ones(case.source.shape[-1])
    case.converted = case.source.clone()
    fit = case.fit(case.closed_form())
    assert all(bool(t.isfinite().all()) for t in tensors(fit.factors[0]))


@pytest.mark.parametrize("method", ["calibrated", "transmla"])
def test_convert_records_the_errors_before_and_after_the_fit(
    method: str, make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    source = make_source(num_hidden_layers=3)
    plain = convert(make_recipe(source, "plain", method=method, reconstruct="off"))
    fitted = convert(make_recipe(source, "fitted", method=method, reconstruct="fast"))
    manifests = [json.loads((folder / "transmla.json").read_text()) for folder in (plain, fitted)]
    assert [m["reconstruct"] for m in manifests] == ["off", "fast"]
    assert all("held_out_after" not in layer for layer in manifests[0]["layers"])
    pairs = [(layer["held_out_before"], layer["held_out_after"]) for layer in manifests[1]["layers"]]
    assert all(after <= before for before, after in pairs)
    assert any(after < before for before, after in pairs)


def test_one_sequence_is_refused_only_if_the_recipe_names_a_fit(
    make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    source = make_source()
    with pytest.raises(TransmlaError, match="one calibration sequence"):
        convert(make_recipe(source, reconstruct="fast", calibration={"sequences": 1}))
    folder = convert(make_recipe(source, reconstruct="auto", calibration={"sequences": 1}))
    assert json.loads((folder / "transmla.json").read_text())["reconstruct"] == "off"


def test_auto_does_not_fit_baseline_methods() -> None:
    gpu = torch.device("cuda")
    assert choose_fit("auto", gpu, 64, baseline="care") == ("off", "method care is a baseline")
    assert choose_fit("full", gpu, 64, baseline="care") == ("full", "")


def test_a_recipe_may_say_off_without_quotes(tmp_path: Path) -> None:
    """YAML reads an unquoted ``off`` as false."""
    file = tmp_path / "recipe.yaml"
    file.write_text("source: s\noutput: o\nreconstruct: off\n")
    assert read_recipe(file, {}).reconstruct == "off"


def test_calibration_tokens_override_the_recipes_sequences(
    make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    """A single given sequence is not enough for a fit, although the recipe asks for more sequences."""
    tokens = torch.arange(60)[None]
    folder = convert(make_recipe(make_source(), reconstruct="auto"), calibration=tokens)
    assert json.loads((folder / "transmla.json").read_text())["reconstruct"] == "off"


@pytest.mark.parametrize(
    ("device", "half", "expected"), [("cuda", True, "high"), ("cuda", False, "highest"), ("cpu", True, "highest")]
)
def test_float32_products_are_fast_only_where_the_source_is_half(device: str, half: bool, expected: str) -> None:
    layer = SourceLayer.__new__(SourceLayer)
    layer.device, layer.half = torch.device(device), half
    with layer.fast_products():
        assert torch.get_float32_matmul_precision() == expected
    assert torch.get_float32_matmul_precision() == "highest"
