"""A step of a fit is captured as one CUDA graph, so it must not copy data from the host or read values on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.uncut_exports import FAMILIES, make_source
from torch.utils._python_dispatch import TorchDispatchMode

from transmla.convert.factorize import factorize
from transmla.convert.fit_layers import FitProblem
from transmla.convert.fit_vector import FitParameters
from transmla.convert.observe import observe
from transmla.convert.source_layer import SourceLayer
from transmla.core.fit_coordinates import Coordinates
from transmla.plan.fit_settings import fit_settings
from transmla.plan.make_plan import make_plan
from transmla.recipe import parse_recipe
from transmla.source.describe import describe, empty_model, family_of

# Names of operations that create constants on the host, read values on the host, or have value-dependent shapes.
HOST_OPERATIONS = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")


class HostAccess(TorchDispatchMode):
    """Records which of ``HOST_OPERATIONS`` run."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations |= {name for part in HOST_OPERATIONS if part in name}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_a_fit_runs_no_host_operation(family: str, tmp_path: Path) -> None:
    model = make_source(family, tmp_path)
    config = model.config
    spec, empty = describe(config), empty_model(config)
    plan = make_plan(spec, parse_recipe({"source": "s", "output": "o", "cache_ratio": 0.5}, "test"), "float32")
    fit = fit_settings("full", 0.5, experts=bool(spec.experts))
    assert fit is not None
    layers = []
    for i in range(fit.window):
        layers.append(SourceLayer(empty, family_of(config), spec, torch.device("cpu")))
        layers[-1].load({name: t.detach() for name, t in model.model.layers[i].state_dict().items()}, i)
    stream = torch.randn(32, 24, config.hidden_size, generator=torch.Generator().manual_seed(0))
    factors, coordinates, hidden = [], [], stream
    for i, layer in enumerate(layers):
        observations = observe(layer, hidden)
        factors.append(factorize(layer.weights(), observations.stats, plan.at(i)))
        moment = observations.stats.second_moment
        coordinates.append(Coordinates.of(factors[-1], moment, layer.view.blocks()))
        hidden = observations.hidden
    parameters = FitParameters(coordinates, factors, [layer.view.masks() for layer in layers])
    problem = FitProblem(layers, stream, stream, fit)
    few = stream[:2]
    with HostAccess() as host:
        parameters.renew()
        errors, energies = problem.losses(parameters.factors(), few, few + 0.1)
        parameters.differentiate((errors / energies).mean())
        parameters.pull_back()
    assert host.operations == set()


def test_host_operations_are_recorded() -> None:
    with HostAccess() as host:
        torch.arange(4.0)[[1, 0]]
        float(torch.ones(1))
    assert {"lift_fresh", "_local_scalar_dense"} <= host.operations
