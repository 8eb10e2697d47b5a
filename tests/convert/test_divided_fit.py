"""The parameters of a fit, divided among processes: the same steps, and equal bits in all processes."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.convert_on_processes import run
from helpers.fit_cases import LENGTH, FitCase, fit_case
from helpers.heal_on_two_processes import start_server
from helpers.tiny_sources import build_model
from helpers.uncut_exports import FAMILIES, make_source
from torch import Tensor

from transmla.artifacts import LayerFactors
from transmla.convert.fit_steps import BETAS, _schedule, descend
from transmla.plan.fit_settings import FitSettings
from transmla.ranks import Ranks, launched

# Four rows a step: two processes divide the rows, and three processes the tokens.
FIT = FitSettings(steps=12, tokens=4 * LENGTH, rate=2e-3, through_mlp=True, window=2)
# Largest relative difference of tensors from one process's. Layers are computed in float32.
TENSORS = 5e-5
CASES = ("plain", "normed queries", "query latent", "three layers")


@cache
def case_of(name: str, *, half: bool = False) -> FitCase:
    family = "qwen3" if name == "normed queries" else "llama"
    model = build_model(family, layout="mha", num_hidden_layers=3, hidden_size=64)
    recipe = {"q_lora_rank": 12} if name == "query latent" else {}
    return fit_case(model, window=3 if name == "three layers" else 2, half=half, **recipe)


def readers(factors: LayerFactors) -> list[Tensor]:
    """Return the maps that read the layer's input."""
    queries = [factors.q_nope, factors.q_pe] if factors.q_latent is None else [factors.q_latent]
    return [*queries, factors.latent, factors.rope]


class Silent(Ranks):
    """One of several processes, of which the others say nothing."""

    def copy_first(self, *tensors: Tensor) -> None:
        pass


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("size", [2, 3, 7, 200])
@pytest.mark.parametrize("name", CASES)
def test_shares_step_as_one_vector(name: str, size: int) -> None:
    """200 processes are more than there are rows, so some shares are empty."""
    case = case_of(name)
    one, shares = case.parameters(), [case.parameters(Silent(rank, size)) for rank in range(size)]
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(leaf.shape, generator=generator) for leaf in one.leaves]
    for parameters in (one, *shares):
        parameters.collect(gradients)
        parameters.pull_back()
        parameters.vector.sub_(parameters.vector.grad, alpha=0.1)
        parameters.renew()
    values = torch.stack([parameters.values[parameters.ranks.rank] for parameters in shares])
    shares[0].values.copy_(values)
    for leaf, divided in zip(one.leaves, shares[0].leaves, strict=True):
        assert difference(divided, leaf) < 1e-6
    for layer, factors in zip(case.layers, shares[0].factors, strict=True):
        masks = layer.view.masks()
        assert bool(masks) == (name == "normed queries")
        for tensor, mask in masks.items():
            assert bool(getattr(factors, tensor)[~mask.expand_as(getattr(factors, tensor))].eq(0).all())


@pytest.mark.parametrize("name", CASES)
def test_a_share_begins_within_a_map_but_at_a_whole_row(name: str) -> None:
    case, within = case_of(name), 0
    for size in (2, 3, 5):
        parameters = case.parameters(Silent(0, size))
        length = len(parameters.vector)
        for factors in parameters.factors:
            for tensor in readers(factors):
                begins = (tensor.data_ptr() - parameters.values.data_ptr()) // tensor.element_size()
                starts = [r * length - begins for r in range(size) if 0 < r * length - begins < tensor.numel()]
                assert all(start % tensor.shape[-1] == 0 for start in starts)
                within += len(starts)
    assert within > 0
    # Three shares of this case have values to spare.
    count = case.parameters().vector.numel()
    assert name != "normed queries" or (count % 3 and case.parameters(Silent(0, 3)).values.numel() > count)


@pytest.mark.parametrize("name", CASES)
def test_one_process_takes_the_plain_steps(name: str) -> None:
    """Adam on one leaf vector, through which autograd differentiates the factors: equal bits."""
    case = case_of(name)
    start = case.parameters()
    vector = start.vector.clone().requires_grad_()
    adam = torch.optim.Adam([vector], lr=torch.zeros(()), betas=BETAS, eps=1e-12, fused=True)
    tensors = [c.to_coordinates(f) for c, f in zip(case.coordinates, case.factors, strict=True)]

    def factors() -> list[LayerFactors]:
        parts = iter((vector * start.scale).split([t.numel() for layer in tensors for t in layer.values()]))
        shaped = [{name: next(parts).view(t.shape) for name, t in layer.items()} for layer in tensors]
        return [c.to_factors(layer) for c, layer in zip(case.coordinates, shaped, strict=True)]

    problem = case.problem(FIT)
    (inputs,) = problem.inputs
    tables = inputs.draw(FIT.steps, torch.Generator().manual_seed(3))
    for step in range(FIT.steps):
        errors, energies = problem.losses(factors(), *inputs.make(*(table[step] for table in tables)))
        vector.grad = torch.autograd.grad((errors / energies).mean(), vector)[0]
        adam.param_groups[0]["lr"].fill_(_schedule(step, FIT.steps) * FIT.rate)
        adam.step()
    parameters = case.parameters()
    descend(problem, parameters, FIT, seed=3)
    assert torch.equal(parameters.vector, vector)
    with torch.no_grad():
        assert digest(parameters.result()) == digest(factors())


@pytest.mark.parametrize(
    ("family", "ratio"), [*((family, 0.5) for family in FAMILIES), pytest.param("llama", 0.2, id="absorbed")]
)
def test_a_half_layer_reads_factors_in_bfloat16_alone(family: str, ratio: float, tmp_path: Path) -> None:
    """Its errors and gradients are those for factors that were rounded before, as processes exchange them."""
    case = fit_case(make_source(family, tmp_path), half=True, cache_ratio=ratio)
    problem, results = case.problem(FIT), []
    few = case.stream[:2]
    for dtype in (torch.float32, torch.bfloat16):
        parameters = case.parameters()
        parameters.renew()
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in parameters.leaves]
        left = iter(leaves)
        names = [c.to_coordinates(f) for c, f in zip(case.coordinates, case.factors, strict=True)]
        factors = [
            type(f)(**(vars(f) | {name: next(left) for name in layer}))
            for f, layer in zip(parameters.factors, names, strict=True)
        ]
        errors, energies = problem.losses(factors, few, few + 0.1)
        results.append([errors, *(g.float() for g in torch.autograd.grad((errors / energies).mean(), leaves))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def digest(factors: list[LayerFactors]) -> str:
    tensors = [t for f in factors for t in vars(f).values() if isinstance(t, Tensor)]
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def fitted(case: FitCase, ranks: Ranks, *, half: bool = False) -> list[LayerFactors]:
    parameters = case.parameters(ranks, half=half)
    descend(case.problem(FIT, ranks), parameters, FIT, seed=3)
    return parameters.result()


def compare(rank: int) -> None:
    """Compare a fit on all processes with one on this process alone."""
    ranks = launched("cpu")
    for name in CASES:
        case = case_of(name)
        one, several = fitted(case, Ranks()), fitted(case, ranks)
        for expected, actual in zip(one, several, strict=True):
            for tensor, value in vars(expected).items():
                if isinstance(value, Tensor):
                    error = difference(getattr(actual, tensor), value)
                    assert error <= TENSORS, (name, tensor, error)
        assert_equal_everywhere(ranks, several)
    case = case_of("plain", half=True)
    exchanged = [fitted(case, ranks, half=half) for half in (False, True)]
    assert digest(exchanged[0]) == digest(exchanged[1])
    assert_equal_everywhere(ranks, exchanged[1])


def assert_equal_everywhere(ranks: Ranks, factors: list[LayerFactors]) -> None:
    own = torch.tensor(list(bytes.fromhex(digest(factors))))
    assert all(torch.equal(own, other) for other in ranks.gather(own))


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_take_the_steps_of_one(size: int, tmp_path: Path) -> None:
    start_server()
    logs = tmp_path / "logs"
    codes = run(size, compare, (), logs)
    assert codes == [0] * size, "\n".join(file.read_text()[-2000:] for file in sorted(logs.iterdir()))


def rows(rank: int) -> None:
    ranks = launched("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        own = torch.arange(5.0, dtype=dtype) + 10 * ranks.rank
        values = torch.zeros(ranks.size, 5, dtype=dtype)
        values[ranks.rank] = own
        ranks.exchange(values)
        assert torch.equal(values, torch.stack([own - 10 * (ranks.rank - r) for r in range(ranks.size)]))
        ranks.add_up_own(values)
        assert torch.equal(values[ranks.rank], own * ranks.size)


def test_rows_are_exchanged_and_added_up_in_place(tmp_path: Path) -> None:
    start_server()
    assert run(3, rows, (), tmp_path / "logs") == [0] * 3
    alone = torch.arange(5.0)[None]
    Ranks().exchange(alone)
    Ranks().add_up_own(alone)
    assert torch.equal(alone, torch.arange(5.0)[None])
