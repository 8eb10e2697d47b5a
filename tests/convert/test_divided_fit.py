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


class Silent(Ranks):
    """One of several processes, of which the others say nothing."""

    def copy_first(self, *tensors: Tensor) -> None:
        pass


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def tensors(factors: list[LayerFactors]) -> dict[str, Tensor]:
    """Return the tensors of all layers' factors, by layer and name."""
    return {f"{i} {name}": t for i, f in enumerate(factors) for name, t in vars(f).items() if isinstance(t, Tensor)}


@pytest.mark.parametrize("size", [2, 3, 7, 100])
@pytest.mark.parametrize("name", CASES)
def test_shares_step_as_one_vector(name: str, size: int) -> None:
    """Parts begin within heads, few tensors are a multiple of 3 and 7, and 100 is more than the rows of some maps."""
    case = case_of(name)
    one, shares = case.parameters(), [case.parameters(Silent(rank, size)) for rank in range(size)]
    assert size == 2 or shares[0].values.numel() > one.vector.numel()
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(t.shape, generator=generator) for name, t in tensors(case.factors).items()}

    def renew() -> list[dict[str, Tensor]]:
        for parameters in (one, *shares):
            parameters.renew()
        values = torch.stack([parameters.values[parameters.ranks.rank] for parameters in shares])
        for parameters in shares:
            parameters.values.copy_(values)
        return [tensors(parameters.factors()) for parameters in (one, *shares)]

    for parameters, factors in zip((one, *shares), renew(), strict=True):
        parameters.differentiate(torch.stack([(factors[n] * w).sum() for n, w in weights.items()]).sum())
        parameters.pull_back()
        assert parameters.vector.grad is not None
        parameters.vector.sub_(parameters.vector.grad, alpha=0.1)
    expected, *others = renew()
    assert all(torch.equal(others[0][n], t) for other in others for n, t in other.items())
    assert all(difference(others[0][n], t) < 1e-6 for n, t in expected.items())
    for i, layer in enumerate(case.layers):
        masks = layer.view.masks()
        assert bool(masks) == (name == "normed queries")
        for n, mask in masks.items():
            assert not others[0][f"{i} {n}"].masked_select(~mask).any()


@pytest.mark.parametrize("name", CASES)
def test_one_process_takes_the_plain_steps(name: str) -> None:
    """Adam on one leaf vector, through which autograd differentiates the factors: equal bits."""
    case = case_of(name)
    start = case.parameters()
    vector = start.vector.clone().requires_grad_()
    adam = torch.optim.Adam([vector], lr=torch.zeros(()), betas=BETAS, eps=1e-12, fused=True)
    fitted = [c.to_coordinates(f) for c, f in zip(case.coordinates, case.factors, strict=True)]

    def factors() -> list[LayerFactors]:
        parts = iter((vector * start.scale).split([t.numel() for layer in fitted for t in layer.values()]))
        shaped = [{name: next(parts).view(t.shape) for name, t in layer.items()} for layer in fitted]
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
        parameters.values = parameters.values.to(dtype)
        errors, energies = problem.losses(parameters.factors(), few, few + 0.1)
        parameters.differentiate((errors / energies).mean())
        results.append([errors, parameters.gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def digest(factors: list[LayerFactors]) -> str:
    values = [t.detach().contiguous().numpy().tobytes() for t in tensors(factors).values()]
    return hashlib.sha256(b"".join(values)).hexdigest()


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
        for tensor, value in tensors(one).items():
            error = difference(tensors(several)[tensor], value)
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
