"""Fits of consecutive layers of tiny models, before their first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors
from transmla.convert.factorize import factorize
from transmla.convert.fit_layers import FitProblem
from transmla.convert.fit_vector import FitParameters
from transmla.convert.observe import observe
from transmla.convert.source_layer import SourceLayer
from transmla.core.fit_coordinates import Coordinates
from transmla.plan.fit_settings import FitSettings
from transmla.plan.make_plan import make_plan
from transmla.ranks import Ranks
from transmla.recipe import parse_recipe
from transmla.source.describe import describe, empty_model, family_of

LENGTH = 24


@dataclass(frozen=True)
class FitCase:
    """Layers with their closed form, their coordinates, and hidden states [N, T, D] that enter the first layer."""

    layers: list[SourceLayer]
    factors: list[LayerFactors]
    coordinates: list[Coordinates]
    stream: Tensor

    def parameters(self, ranks: Ranks | None = None, *, half: bool = False) -> FitParameters:
        masks = [layer.view.masks() for layer in self.layers]
        return FitParameters(self.coordinates, self.factors, masks, ranks, half=half)

    def problem(self, fit: FitSettings, ranks: Ranks | None = None) -> FitProblem:
        problem = FitProblem(self.layers, self.stream, self.stream + 0.1 * self.stream.roll(1, 0), fit)
        problem.ranks = ranks or Ranks()
        return problem


def fit_case(model: Any, *, window: int = 2, half: bool = False, **recipe: Any) -> FitCase:
    """Return a fit of the first ``window`` layers of ``model``, at half the cache unless ``recipe`` says otherwise."""
    config = model.config
    spec, empty = describe(config), empty_model(config)
    values = {"source": "s", "output": "o", "cache_ratio": 0.5, "allow_no_saving": True, **recipe}
    plan = make_plan(spec, parse_recipe(values, "test"), "float32")
    stream = torch.randn(16, LENGTH, config.hidden_size, generator=torch.Generator().manual_seed(0))
    layers, factors, coordinates, hidden = [], [], [], stream
    for i in range(window):
        layer = SourceLayer(empty, family_of(config), spec, torch.device("cpu"), half=half)
        layer.load({name: t.detach().clone() for name, t in model.model.layers[i].state_dict().items()}, i)
        observations = observe(layer, hidden)
        layers.append(layer)
        factors.append(factorize(layer.weights(), observations.stats, plan.at(i)))
        coordinates.append(Coordinates.of(factors[-1], observations.stats.second_moment, layer.view.blocks()))
        hidden = observations.hidden
    return FitCase(layers, factors, coordinates, stream)
