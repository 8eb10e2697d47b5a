"""Rotary concentration is exact with all slots, and optimal and symmetric with fewer slots."""

from __future__ import annotations

import pytest
import torch
from helpers.random_layer import second_moment
from hypothesis import given, settings
from hypothesis import strategies as st

from transmla.artifacts import RotaryPlan
from transmla.core.concentrate import Concentration, concentrate, slots_by_fold

PAIRS, WIDTH = 4, 10
SEEDS = st.integers(0, 10_000)


def keys(heads: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random complex keys [G, p, D], a second moment [D, D] and uneven channel weights [G, p]."""
    generator = torch.Generator().manual_seed(seed)
    kappa = torch.randn(heads, PAIRS, WIDTH, generator=generator, dtype=torch.complex128)
    moment = second_moment(torch.randn(50, WIDTH, generator=generator, dtype=torch.float64))
    return kappa, moment, torch.rand(heads, PAIRS, generator=generator, dtype=torch.float64) ** 3 + 1e-3


def weighted_error(kept: Concentration, kappa: torch.Tensor, moment: torch.Tensor, weight: torch.Tensor) -> float:
    """Return Σ w·E|residual|² over all channels."""
    rest = kept.residual(kappa)
    return float((torch.einsum("gpD,DE,gpE->gp", rest, moment.to(rest), rest.conj()).real * weight).sum())


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("real", [False, True])
def test_one_slot_per_component_is_exact(heads: int, real: bool) -> None:
    kappa, moment, weight = keys(heads, heads)
    plan = RotaryPlan(tuple(f for f in range(PAIRS) for _ in range(heads)), freqfold=1)
    kept = concentrate(kappa, moment, weight, plan, real=real)
    assert float(kept.residual(kappa).abs().max()) < 1e-12
    # With freqfold 1, a slot holds keys of its frequency only.
    for slot, frequency in enumerate(plan.slots):
        others = [f for f in range(PAIRS) if f != frequency]
        assert float(kept.mix[slot, :, others].abs().max()) == 0


@settings(deadline=None, max_examples=30)
@given(heads=st.integers(1, 4), fold=st.sampled_from([1, 2, 4]), seed=SEEDS)
def test_optimal_in_the_weighted_metric(heads: int, fold: int, seed: int) -> None:
    """Compare with Eckart–Young for each fold; the published real, unweighted rotation is never better."""
    kappa, moment, weight = keys(heads, seed)
    plan = RotaryPlan(tuple(range(0, PAIRS, 2)) if fold > 1 else tuple(range(PAIRS)), fold)
    error = weighted_error(concentrate(kappa, moment, weight, plan), kappa, moment, weight)
    expected = 0.0
    root = torch.linalg.cholesky(moment).to(kappa.dtype)
    for run, slots in slots_by_fold(plan, PAIRS):
        stacked = (weight[:, run].sqrt()[..., None] * kappa[:, run]).flatten(0, 1)
        expected += float(torch.linalg.svdvals(stacked @ root)[len(slots) :].square().sum())
    assert error == pytest.approx(expected, rel=1e-9, abs=1e-9)
    published = concentrate(kappa, moment, torch.ones_like(weight), plan, real=True)
    assert error <= weighted_error(published, kappa, moment, weight) + 1e-9


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, fold=st.sampled_from([1, 2]))
def test_invariant_to_the_order_of_heads(seed: int, fold: int) -> None:
    kappa, moment, weight = keys(3, seed)
    plan, order = RotaryPlan((0, 2), 2) if fold == 2 else RotaryPlan(tuple(range(PAIRS)), 1), [2, 0, 1]
    rest = concentrate(kappa, moment, weight, plan).residual(kappa)
    permuted = concentrate(kappa[order], moment, weight[order], plan).residual(kappa[order])
    torch.testing.assert_close(permuted, rest[order], atol=1e-8, rtol=0)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_equivariant_to_unitary_mixing_of_heads(seed: int) -> None:
    """A unitary mixing of the heads of one frequency commutes with the rotation, so only the basis changes."""
    kappa, moment, _ = keys(3, seed)
    uniform = torch.ones(3, PAIRS).double()
    generator = torch.Generator().manual_seed(seed)
    unitary, _ = torch.linalg.qr(torch.randn(PAIRS, 3, 3, generator=generator, dtype=torch.complex128))
    mixed = torch.einsum("pgh,hpD->gpD", unitary, kappa)
    plan = RotaryPlan(tuple(range(PAIRS)), 1)
    rest = concentrate(kappa, moment, uniform, plan).residual(kappa)
    mixed_rest = concentrate(mixed, moment, uniform, plan).residual(mixed)
    torch.testing.assert_close(mixed_rest, torch.einsum("pgh,hpD->gpD", unitary, rest), atol=1e-8, rtol=0)


def test_folds_cover_all_frequencies() -> None:
    assert slots_by_fold(RotaryPlan((0, 2, 2), 2), 5) == [
        (range(0, 2), [0]),
        (range(2, 4), [1, 2]),
        (range(4, 5), []),
    ]


@pytest.mark.parametrize("dead", [0.0, 1e-300])
def test_unimportant_channels_stay_finite(dead: float) -> None:
    """Weights of zero, for one head or for all heads, give finite factors in float32."""
    kappa, moment, weight = keys(3, 0)
    weight[1] = dead
    for importance in (weight, torch.full_like(weight, dead)):
        kept = concentrate(kappa, moment, importance, RotaryPlan(tuple(range(PAIRS)), 1))
        for tensor in (kept.z, kept.mix, kept.residual(kappa)):
            assert bool(tensor.to(torch.complex64).isfinite().all())
        assert float(kept.z.abs().to(torch.float32).amax(-1).min()) > 0
