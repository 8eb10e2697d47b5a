"""A trial run of a loaded model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from transmla.errors import TransmlaError
from transmla.source.load import check_runs, load_model


def test_a_trial_run_of_a_good_model_warns_of_nothing(make_source: Callable[..., Path]) -> None:
    """Its warnings would stand among the output of `transmla convert`."""
    source = make_source(num_hidden_layers=3)
    model = load_model(source, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_runs(model, source)


def test_a_model_that_cannot_run_is_refused(make_source: Callable[..., Path]) -> None:
    source = make_source(num_hidden_layers=3)
    model = load_model(source, dtype=torch.float32)
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(3, 3)
    with pytest.raises(TransmlaError, match=r"cannot run; .*; use the config.json that belongs to its weights"):
        check_runs(model, source)
