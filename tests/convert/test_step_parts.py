"""Processes that divide a step of a fit compute the errors and the gradient of one process."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.convert_on_processes import run
from helpers.heal_on_two_processes import start_server
from helpers.uncut_exports import FAMILIES, make_source
from transformers import AutoModelForCausalLM

from transmla.convert.factorize import factorize
from transmla.convert.fit_layers import FitProblem
from transmla.convert.observe import observe
from transmla.convert.source_layer import SourceLayer
from transmla.convert.step_parts import part_of_step
from transmla.plan.fit_settings import fit_settings
from transmla.plan.make_plan import make_plan
from transmla.ranks import Ranks, launched
from transmla.recipe import parse_recipe
from transmla.source.describe import describe, empty_model, family_of
from transmla.token_split import TokenSplit

LENGTH = 26


def problem_of(folder: Path, ratio: float) -> tuple[FitProblem, list[Any], torch.Tensor]:
    """Return two layers of the model in ``folder`` as a fit, their closed form, and hidden states that enter them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    spec, empty = describe(config), empty_model(config)
    recipe = parse_recipe({"source": "s", "output": "o", "cache_ratio": ratio, "allow_no_saving": True}, "test")
    plan = make_plan(spec, recipe, "float32")
    fit = fit_settings("full", 0.5)
    assert fit is not None
    stream = torch.randn(16, LENGTH, config.hidden_size, generator=torch.Generator().manual_seed(0))
    layers, factors, hidden = [], [], stream
    for i in range(fit.window):
        layers.append(SourceLayer(empty, family_of(config), spec, torch.device("cpu")))
        layers[-1].load({name: t.detach() for name, t in model.model.layers[i].state_dict().items()}, i)
        observations = observe(layers[-1], hidden)
        factors.append(factorize(layers[-1].weights(), observations.stats, plan.at(i)).to(torch.float32))
        hidden = observations.hidden
    return FitProblem(layers, stream, stream, fit), factors, stream


def compare(rank: int, folders: list[tuple[str, str, float]]) -> None:
    """Compare the sums over processes with one process's numbers, for every model."""
    ranks = launched("cpu")
    for name, folder, ratio in folders:
        problem, factors, stream = problem_of(Path(folder), ratio)
        gaps = torch.arange(LENGTH) + 3 * (torch.arange(LENGTH) > 10)
        for rows in (1, ranks.size):
            inputs = stream[:rows], stream[:rows] + 0.1 * stream[8 : 8 + rows], gaps
            results = []
            for part in (part_of_step(Ranks(), rows, LENGTH, 4), part_of_step(ranks, rows, LENGTH, 4)):
                leaves = [f.latent.clone().requires_grad_() for f in factors]
                changed = [type(f)(**vars(f) | {"latent": leaf}) for f, leaf in zip(factors, leaves, strict=True)]
                own = *(hidden[part.place] for hidden in inputs[:2]), gaps[part.place[1]]
                errors, energies = problem.losses(changed, *own, part.split)
                gradients = torch.autograd.grad((errors * part.weight).sum(), leaves)
                results.append([errors.detach() * part.weight, energies * part.weight, *gradients])
            assert (part.split is None) == (rows == ranks.size)
            ranks.add_up(*results[1])
            for whole, summed in zip(*results, strict=True):
                worst = float((whole - summed).norm() / whole.norm())
                assert worst < 1e-4, (name, rows, worst)
        print(name, "equal")


def test_all_families(tmp_path: Path) -> None:
    """Windows, softcaps, sinks, experts, normed queries and biases; and the absorbed form, for a small latent."""
    start_server()
    folders = []
    for name in FAMILIES:
        make_source(name, tmp_path / name)
        folders.append((name, str(tmp_path / name), 0.5))
    folders.append(("absorbed", str(tmp_path / "llama"), 0.2))
    codes = run(3, compare, (folders,), tmp_path / "logs")
    assert codes == [0] * 3, (tmp_path / "logs" / "0.log").read_text()[-3000:]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_are_consecutive_and_complete(size: int) -> None:
    for count in (0, 1, 4, 7, 64):
        shares = [Ranks(rank, size).share(count) for rank in range(size)]
        assert (shares[0].start, shares[-1].stop) == (0, count)
        assert all(before.stop == after.start for before, after in pairwise(shares))
        sizes = [share.stop - share.start for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_a_step_is_divided_by_rows_if_it_can_be() -> None:
    ranks = Ranks(1, 2)
    assert part_of_step(ranks, 4, 32, 4).rows == slice(2, 4)
    assert part_of_step(ranks, 1, 33, 4).split == TokenSplit(ranks, 33)
    assert part_of_step(ranks, 1, 33, 4).weight == pytest.approx(17 / 33)
    assert part_of_step(ranks, 1, 33, 1).split is None  # one head: every process computes the whole step
    assert part_of_step(ranks, 1, 33, 1).weight == 0.5
