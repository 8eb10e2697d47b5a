"""Measure a source before it is converted: spectra, rotary energy, phases, and the error at each cache budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import Plan
from transmla.convert.calibration_text import calibration_tokens, check_length, read_calibration
from transmla.convert.factorize import factorize
from transmla.convert.finite import check_hidden, check_numbers, check_tensors, decompositions
from transmla.convert.fit_layers import held_out
from transmla.convert.observe import Observations, observe
from transmla.convert.prepare import Prepared, prepare, with_cache_ratio
from transmla.convert.relative_error import relative_error
from transmla.convert.source_layer import SourceLayer
from transmla.core.spectrum import Spectrum, spectrum
from transmla.errors import TransmlaError
from transmla.export.card import public_name
from transmla.recipe import Recipe
from transmla.reporter import Reporter
from transmla.source.checkpoint import Checkpoint, check_finite
from transmla.source.decoder_layer import embedded
from transmla.source.load import load_tokenizer
from transmla.source.open_source import runs_in_bfloat16

# Shares of the source's cache at which every layer's error is measured.
BUDGETS = (0.5, 1 / 3, 0.25, 0.125)


@dataclass(frozen=True)
class LayerInspection:
    """Measurements of one layer.

    Attributes:
        spectrum: the layer's spectrum.
        errors: share of the source's cache → relative squared error of the closed form's attention output.
    """

    spectrum: Spectrum
    errors: dict[float, float]


@dataclass(frozen=True)
class Inspection:
    """Measurements of all layers of one source.

    Attributes:
        source: the source's name.
        plans: share of the source's cache → the plan at this share, largest share first.
        count: number of the source's layers.
        layers: the measurements of each measured layer, by its index in order.
    """

    source: str
    plans: dict[float, Plan]
    count: int
    layers: dict[int, LayerInspection]

    def mean_error(self, budget: float) -> float:
        """Return the relative squared attention error at ``budget``, averaged over the measured layers."""
        return sum(layer.errors[budget] for layer in self.layers.values()) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return all measurements as plain values."""
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
            "layers": [self._layer_to_dict(i) for i in range(self.count)],
        }

    def _layer_to_dict(self, index: int) -> dict[str, Any]:
        """Return the measurements of one layer as plain values; a layer that is not converted has no error."""
        layer = self.layers.get(index)
        if layer is None:
            return {"errors": [0.0] * len(self.plans), "kept": True}
        named = {name: value.tolist() for name, value in vars(layer.spectrum).items()}
        return {**named, "errors": list(layer.errors.values()), "kept": False}


def inspect_source(recipe: Recipe, reporter: Reporter) -> Inspection:
    """Run the source over the recipe's calibration text, and measure every layer that would be converted.

    Errors are measured for the shape that ``convert`` chooses with the same recipe, and for one shape at each of
    BUDGETS. They are errors of the closed form, before any fit; a method with two passes is measured after its first
    pass. The source runs up to the last layer that is measured, with one layer in memory at a time. With a calibration
    text that is not sampled from the source, the layers after this one are not read.

    Args:
        recipe: the recipe that ``convert`` would run.
        reporter: receives progress.

    Raises:
        TransmlaError: if the recipe, the source or the calibration text cannot be used.
    """
    prepared = prepare(recipe)
    source, recipe = prepared.source, prepared.recipe
    checkpoint, names, count = source.checkpoint, source.family.tensors, source.spec.num_hidden_layers
    plans = _plans(prepared, reporter)
    check_length(source.spec, recipe.calibration.length or 0)
    tokenizer = load_tokenizer(source.path)
    text = read_calibration(recipe, source, tokenizer, reporter)
    # Samples of the source are cached by its fingerprint, which reads all weights.
    fingerprint = checkpoint.fingerprint() if text.sampled else ""
    tokens = calibration_tokens(recipe, source, tokenizer, text, fingerprint, reporter)
    half = runs_in_bfloat16(source, prepared.device)
    layer = SourceLayer(source.model, source.family, source.spec, prepared.device, half=half)
    embedding = checkpoint.read(names["embed"])
    check_finite(names["embed"], embedding)
    stream = embedded(source.model, tokens, embedding)
    del embedding
    check_hidden("the embedding", {"source": stream})
    measured = [i for i in range(count) if i not in prepared.plan.kept]
    layers: dict[int, LayerInspection] = {}
    reporter.stage("inspecting layers", measured[-1] + 1)
    for i in range(measured[-1] + 1):
        layer.load(_read_layer(checkpoint, names["layer"].format(i=i)), i)
        if i in prepared.plan.kept:
            stream = layer.run_stream(stream, None)[1]
            check_hidden(layer.place, {"source": stream})
        else:
            with decompositions(layer.place):
                observations = observe(layer, stream)
                inspected = _inspect_layer(layer, i, observations, stream[-held_out(len(stream)) :], plans)
            numbers = {f"the error at {budget:.1%}": error for budget, error in inspected.errors.items()}
            check_numbers(layer.place, numbers)
            check_tensors(layer.place, vars(inspected.spectrum))
            layers[i] = inspected
            stream = observations.hidden
        reporter.advance(i + 1)
    return Inspection(public_name(recipe.source), plans, count, layers)


def _read_layer(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of one layer by their names without ``prefix``; raises if one is not finite."""
    tensors = checkpoint.layer(prefix)
    for name, tensor in tensors.items():
        check_finite(prefix + name, tensor)
    return tensors


def _inspect_layer(
    layer: SourceLayer, index: int, observations: Observations, evaluated: Tensor, plans: dict[float, Plan]
) -> LayerInspection:
    """Measure the spectrum of one layer, and the closed form's error on the ``evaluated`` hidden states [n, T, D]."""
    weights, errors = layer.weights(), {}
    for budget, plan in plans.items():
        factors = factorize(weights, observations.stats, plan.at(index))
        errors[budget] = relative_error(layer, factors.to(torch.float32), evaluated)
    exact = observations.stats.to(torch.float64)
    return LayerInspection(spectrum(weights.to(torch.float64), exact, layer.spec), errors)


def _plans(prepared: Prepared, reporter: Reporter) -> dict[float, Plan]:
    """Return the plans of the recipe and of every budget that has a valid shape, largest cache first.

    Budgets without a valid shape are reported as messages.
    """
    plans: dict[float, Plan] = {}
    for budget in BUDGETS:
        try:
            plans[budget] = with_cache_ratio(prepared, budget).plan
        except TransmlaError as error:
            reporter.message(f"no shape at {budget:.1%} of the cache: {error}")
    planned = prepared.plan
    if planned.shape not in [plan.shape for plan in plans.values()]:
        plans[planned.cache_ratio] = planned
    return dict(sorted(plans.items(), reverse=True))
