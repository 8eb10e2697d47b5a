"""Low-rank approximation in the metric of the data, compared with direct solutions on samples."""

from __future__ import annotations

import pytest
import torch
from helpers.random_layer import second_moment
from hypothesis import given, settings
from hypothesis import strategies as st

from transmla.core.linalg import latent_basis, regress, regularise, sqrtm_pair

SEEDS = st.integers(0, 10_000)


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def weighted_error(target: torch.Tensor, basis: torch.Tensor, moment: torch.Tensor) -> float:
    """Return E‖T x − B W_c x‖² with the best read-out B."""
    rest = target - regress(target, basis, moment) @ basis
    return float(((rest @ moment) * rest).sum())


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(2, 20), width=st.integers(2, 12), data=st.data(), seed=SEEDS)
def test_latent_basis_is_the_optimum(rows: int, width: int, data: st.DataObject, seed: int) -> None:
    """The error equals Eckart–Young's on the samples, and is never above that of the plain SVD."""
    rank = data.draw(st.integers(1, min(rows, width)))
    generator = torch.Generator().manual_seed(seed)
    x = normal(generator, 6 * width, width) @ normal(generator, width, width)
    target, moment = normal(generator, rows, width), second_moment(x)
    basis = latent_basis(target, moment, rank)
    error, energy = weighted_error(target, basis, moment), float((x @ target.mT).square().sum(-1).mean())

    singular = torch.linalg.svdvals(x @ target.mT) / len(x) ** 0.5
    assert error == pytest.approx(float(singular[rank:].square().sum()), abs=1e-9 * energy)
    _, _, plain = torch.linalg.svd(target, full_matrices=False)
    assert error <= weighted_error(target, plain[:rank], moment) + 1e-9 * energy


def test_latent_is_white() -> None:
    generator = torch.Generator().manual_seed(4)
    moment = second_moment(normal(generator, 60, 9) @ normal(generator, 9, 9))
    basis = latent_basis(normal(generator, 14, 9), moment, 5)
    torch.testing.assert_close(basis @ moment @ basis.mT, torch.eye(5).double(), atol=1e-9, rtol=0)


def test_full_rank_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    moment = second_moment(normal(generator, 90, 10))
    for rows in (4, 10, 25):
        target = normal(generator, rows, 10)
        basis = latent_basis(target, moment, min(rows, 10))
        torch.testing.assert_close(regress(target, basis, moment) @ basis, target, atol=1e-10, rtol=0)


@settings(deadline=None, max_examples=25)
@given(rank=st.integers(1, 6), seed=SEEDS)
def test_regress_is_least_squares_on_samples(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, target, basis = normal(generator, 50, 8), normal(generator, 3, 5, 8), normal(generator, rank, 8)
    expected = torch.linalg.lstsq(x @ basis.mT, x @ target.flatten(0, 1).mT).solution.mT
    readout = regress(target, basis, second_moment(x))
    torch.testing.assert_close(readout, expected.view(3, 5, rank), atol=1e-8, rtol=1e-6)


def test_square_roots() -> None:
    moment = second_moment(normal(torch.Generator().manual_seed(1), 40, 9)).expand(2, 9, 9)
    root, inverse = sqrtm_pair(moment)
    torch.testing.assert_close(root @ root, moment)
    torch.testing.assert_close(root @ inverse, torch.eye(9).double().expand(2, 9, 9))
    torch.testing.assert_close(root, root.mT)


@pytest.mark.parametrize("directions", [0, 1, 3, 11])
def test_rank_deficient_moments_stay_finite(directions: int) -> None:
    """Inputs that span few directions give finite results, and these directions are still approximated."""
    generator = torch.Generator().manual_seed(directions)
    x = normal(generator, 60, directions) @ normal(generator, directions, 12)
    moment, target = second_moment(x), normal(generator, 20, 12)
    assert all(bool(t.isfinite().all()) for t in sqrtm_pair(moment))
    safe = regularise(moment)
    assert float(torch.linalg.eigvalsh(safe).min()) > 0
    for rank in (1, 6, 12):
        basis = latent_basis(target, safe, rank)
        readout = regress(target, basis, safe)
        assert bool(basis.isfinite().all())
        assert bool(readout.isfinite().all())
        if rank >= directions:
            rest = (target - readout @ basis) @ x.mT
            assert float(rest.norm()) <= 1e-2 * float((target @ x.mT).norm())


def test_regularise_adds_a_fraction_of_the_mean_diagonal() -> None:
    moment = torch.diag(torch.tensor([1.0, 2.0, 0.0, 5.0]).double())
    assert torch.equal(regularise(moment, 0.5) - moment, torch.eye(4).double())
