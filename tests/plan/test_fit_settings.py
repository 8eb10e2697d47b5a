"""The settings of a fit follow the device, the text, the cache and the size of the layers."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from transmla.errors import TransmlaError
from transmla.plan.fit_settings import FITS, SMALL_CACHE, choose_fit, fit_settings
from transmla.recipe import Reconstruct


def test_auto_chooses_the_fit_by_device_and_text() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [choose_fit("auto", device, 2) for device in (cpu, gpu)] == [("fast", ""), ("full", "")]
    assert choose_fit("auto", gpu, 1) == ("off", "one calibration sequence")
    assert choose_fit("off", gpu, 64) == ("off", "--reconstruct off")
    with pytest.raises(TransmlaError, match="at least 2"):
        choose_fit("full", cpu, 1)


def test_the_recipe_allows_exactly_the_known_fits() -> None:
    (choices,) = (arg for arg in get_args(Reconstruct) if get_args(arg))
    assert {"auto", "off", *FITS} == set(get_args(choices))


def test_a_small_cache_is_fitted_with_more_steps() -> None:
    easy, hard = fit_settings("full", SMALL_CACHE), fit_settings("full", SMALL_CACHE - 0.01)
    assert easy == FITS["full"]
    assert hard is not None
    assert hard.steps == 1.5 * FITS["full"].steps
    assert fit_settings("off", 0.5) is None


def test_large_layers_are_fitted_with_fewer_steps() -> None:
    """Not those with experts, whose fit leaves out the MLP."""
    steps = FITS["full"].steps
    found = [fit_settings("full", 0.5, layer_parameters=weights) for weights in (41_000_000, 80_000_000, 900_000_000)]
    assert [fit.steps for fit in found if fit is not None] == [steps, 0.75 * steps, 0.5 * steps]
    experts = fit_settings("full", 0.5, layer_parameters=900_000_000, experts=True)
    assert experts is not None
    assert experts.steps == steps
