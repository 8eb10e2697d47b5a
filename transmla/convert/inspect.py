"""Looking at a source before converting it: per-layer spectra, rotary energy, phases, loss per budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import Plan
from transmla.convert.calibration_text import calibration_tokens, check_length
from transmla.convert.factorize import factorize
from transmla.convert.layers import relative_error
from transmla.convert.prepare import Prepared, prepare, with_cache_ratio
from transmla.convert.reconstruct import held_out
from transmla.convert.source_layer import Observations, SourceLayer
from transmla.core.spectrum import Spectrum, spectrum
from transmla.errors import TransmlaError
from transmla.export.card import public_name
from transmla.recipe import Recipe
from transmla.reporter import Reporter
from transmla.source.decoder_layer import embedded
from transmla.source.load import load_tokenizer
from transmla.source.open_source import runs_in_bfloat16

# Shares of the source's cache for which the loss is predicted.
BUDGETS = (0.5, 1 / 3, 0.25, 0.125)


@dataclass(frozen=True)
class LayerInspection:
    """One layer's spectrum, and the closed form's relative attention error by budget."""

    spectrum: Spectrum
    errors: dict[float, float]


@dataclass(frozen=True)
class Inspection:
    """All layers of one source; ``plans`` holds the shape each budget stands for."""

    source: str
    plans: dict[float, Plan]
    layers: list[LayerInspection]

    def mean_error(self, budget: float) -> float:
        """Relative attention error at ``budget``, averaged over layers."""
        return sum(layer.errors[budget] for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "source": self.source,
            "budgets": [
                {
                    "cache_ratio": plan.cache_ratio,
                    "kv_lora_rank": plan.shape.kv_lora_rank,
                    "qk_rope_head_dim": plan.shape.qk_rope_head_dim,
                    "mean_error": self.mean_error(budget),
                }
                for budget, plan in self.plans.items()
            ],
            "layers": [
                {
                    **{name: value.tolist() for name, value in vars(layer.spectrum).items()},
                    "errors": list(layer.errors.values()),
                }
                for layer in self.layers
            ],
        }


def inspect_source(recipe: Recipe, reporter: Reporter) -> Inspection:
    """Run the source over the recipe's calibration text and measure every layer.

    Shapes are those that ``convert`` chooses with the same recipe: its own, and one for each of BUDGETS. Errors are
    those of the closed form, before any fit; of a method with two passes, of the first alone. Layers that keep the
    source's attention have no error.

    Raises:
        TransmlaError: for bad input, and where no budget has a shape that fits.
    """
    prepared = prepare(recipe)
    source, recipe = prepared.source, prepared.recipe
    plans = _plans(prepared, reporter)
    check_length(source.spec, recipe.calibration.length)
    tokens = calibration_tokens(recipe, source, load_tokenizer(source.path), reporter)
    source.checkpoint.fingerprint()  # refuses weights that are not finite
    half = runs_in_bfloat16(source, prepared.device)
    layer = SourceLayer(source.model, source.family, source.spec, prepared.device, half=half)
    stream = embedded(source.model, tokens, source.checkpoint.read(source.family.tensors["embed"]))
    layers = []
    reporter.stage("inspecting layers", source.spec.num_hidden_layers)
    for i in range(source.spec.num_hidden_layers):
        layer.load(source.checkpoint.layer(source.family.tensors["layer"].format(i=i)), i)
        seen = layer.observe(stream)
        layers.append(_inspect_layer(layer, i, seen, stream[-held_out(len(stream)) :], plans))
        stream = seen.hidden
        reporter.advance(i + 1)
    return Inspection(public_name(recipe.source), plans, layers)


def _inspect_layer(
    layer: SourceLayer, index: int, seen: Observations, judged: Tensor, plans: dict[float, Plan]
) -> LayerInspection:
    """Measure the spectrum of one layer, and the closed form's error on the ``judged`` sequences [n, T, D]."""
    weights, errors = layer.weights(), {}
    for budget, plan in plans.items():
        if index in plan.kept:
            errors[budget] = 0.0
            continue
        factors = factorize(weights, seen.stats, plan.at(index))
        errors[budget] = relative_error(layer, factors.to(torch.float32), judged)
    exact = seen.stats.to(torch.float64)
    return LayerInspection(spectrum(weights.to(torch.float64), exact, layer.spec), errors)


def _plans(prepared: Prepared, reporter: Reporter) -> dict[float, Plan]:
    """The plan of the recipe and of every budget that has a shape, largest cache first; the others are reported."""
    plans: dict[float, Plan] = {}
    for budget in BUDGETS:
        try:
            plans[budget] = with_cache_ratio(prepared, budget).plan
        except TransmlaError as error:
            reporter.message(f"no shape at {budget:.1%} of the cache: {error}")
    own = prepared.plan
    if own.shape not in [plan.shape for plan in plans.values()]:
        plans[own.cache_ratio] = own
    return dict(sorted(plans.items(), reverse=True))
