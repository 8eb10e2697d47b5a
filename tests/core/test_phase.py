"""Calibrated phase against direct least squares over every distance and every phase of conj(q)·k."""

from __future__ import annotations

import pytest
import torch
from helpers.random_layer import HIDDEN, make_layer, make_plan, observed, second_moment
from hypothesis import given, settings
from hypothesis import strategies as st

from transmla.artifacts import RotaryPlan
from transmla.convert.source_layer import sum_by_distance
from transmla.core.concentrate import concentrate
from transmla.core.phase import characteristic
from transmla.core.readout import Distances, joint_readout
from transmla.registry import scan

SEEDS = st.integers(0, 10_000)
LENGTH = 40


def distances(heads: int, seed: int, length: int = LENGTH) -> torch.Tensor:
    """Random distance distributions [H, T], some spread out, some close to a point."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(heads, length, generator=generator, dtype=torch.float64) ** 6
    return mass / mass.sum(-1, keepdim=True)


def least_squares(mass: torch.Tensor, channel: float, slots: tuple[float, ...]) -> tuple[torch.Tensor, float]:
    """Complex constants minimising E(Re c·(e^{−iθΔ} − Σ constant·e^{−iθ_sΔ}))², and the error left.

    c takes the phases 1, i, −1, −i with equal weight at every Δ: circular, and independent of Δ.
    """
    delta = torch.arange(len(mass), dtype=torch.float64)
    product = torch.tensor([1, 1j, -1, -1j], dtype=torch.complex128)[:, None]
    root = (mass / 4).sqrt()
    columns = [product * torch.exp(-1j * slot * delta) for slot in slots]
    # Re(c·w) = Re c·Re w − Im c·Im w: two real unknowns for each complex constant.
    design = torch.stack([part for z in columns for part in (z.real * root, -z.imag * root)], -1)
    wanted = (product * torch.exp(-1j * channel * delta)).real * root
    solution = torch.linalg.lstsq(design.flatten(0, 1), wanted.reshape(-1, 1)).solution
    error = float((design.flatten(0, 1) @ solution - wanted.reshape(-1, 1)).square().sum())
    return torch.complex(solution[0::2, 0], solution[1::2, 0]), error


@settings(deadline=None, max_examples=30)
@given(theta=st.floats(0.0, 3.1), seed=SEEDS)
def test_characteristic_is_the_best_constant(theta: float, seed: int) -> None:
    mass = distances(1, seed)
    phi = characteristic(mass, torch.tensor([theta], dtype=torch.float64))[0, 0]
    (best,), error = least_squares(mass[0], theta, (0.0,))
    assert complex(phi) == pytest.approx(complex(best), abs=1e-9)
    # Half of 1 − |φ|²: a circular c puts half of its energy into the real part.
    assert error == pytest.approx((1 - float(phi.abs()) ** 2) / 2, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(rank=st.integers(0, 3), slots=st.integers(1, 3), seed=SEEDS)
def test_joint_readout_is_least_squares(rank: int, slots: int, seed: int) -> None:
    """Against one solve over every token at every distance; the ridge may cost a trifle."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    kappa = torch.randn(1, 3, 6, generator=generator, dtype=torch.complex128)
    z = torch.randn(slots, 6, generator=generator, dtype=torch.complex128)
    latent = torch.randn(rank, 6, generator=generator, dtype=torch.float64)
    mix = torch.randn(slots, 1, 3, generator=generator, dtype=torch.complex128)
    theta, mass = torch.tensor([1.0, 0.4, 0.1]).double(), distances(2, seed)
    turns = Distances.measure(mass, theta, theta[:slots])
    from_latent, from_slots = joint_readout(kappa, latent, z, mix, second_moment(x), turns)

    delta = torch.arange(LENGTH, dtype=torch.float64)
    wave = torch.exp(-1j * theta[:, None] * delta)
    tokens = x.to(kappa.dtype)
    still = torch.einsum("nD,rD,t->ntr", tokens, latent.to(kappa.dtype), torch.ones_like(wave[0]))
    turning = torch.einsum("nD,sD,st->nts", tokens, z, wave[:slots])
    wanted = torch.einsum("nD,pD,pt->ntp", tokens, kappa[0], wave)
    for head in range(2):
        root = (mass[head] / len(x)).sqrt()[:, None]
        design = (torch.cat([still, turning], -1) * root).flatten(0, 1)
        target = (wanted * root).flatten(0, 1)
        best = design @ torch.linalg.lstsq(design, target, driver="gelsd").solution - target
        got = design @ torch.cat([from_latent[head], from_slots[head]], -1).mT - target
        energy = float(target.abs().square().sum())
        assert float(got.abs().square().sum()) <= float(best.abs().square().sum()) + 1e-4 * energy


@pytest.mark.parametrize("heads", [1, 3])
def test_keys_that_fit_their_own_slots_are_read_back_exactly(heads: int) -> None:
    """Whatever the ridge, and although the latent would have something to offer."""
    generator = torch.Generator().manual_seed(heads)
    kappa = torch.randn(heads, 3, 6, generator=generator, dtype=torch.complex128)
    moment = second_moment(torch.randn(30, 6, generator=generator, dtype=torch.float64))
    latent = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    own, theta = [f for f in range(3) for _ in range(heads)], torch.tensor([1.0, 0.4, 0.1]).double()
    kept = concentrate(kappa, moment, torch.ones(heads, 3).double(), RotaryPlan(tuple(own), 1))
    turns = Distances.measure(distances(2 * heads, 0), theta, theta[own])
    from_latent, from_slots = joint_readout(kappa, latent, kept.z, kept.mix, moment, turns)
    assert float(from_latent.abs().max()) <= 1e-8
    for head in range(2 * heads):
        # Read back by each frequency's own slots, and by no other.
        torch.testing.assert_close(from_slots[head] @ kept.z, kappa[head // 2], atol=1e-8, rtol=0)
        assert float((from_slots[head] * ~turns.own).abs().max()) <= 1e-8


def test_point_mass_and_position_zero() -> None:
    """A head that looks at one distance only loses nothing by a constant."""
    mass = torch.zeros(2, LENGTH).double()
    mass[0, 0] = mass[1, 7] = 1
    theta = torch.tensor([1.0, 0.25]).double()
    phi = characteristic(mass, theta)
    torch.testing.assert_close(phi[0], torch.ones(2, dtype=torch.complex128))
    torch.testing.assert_close(phi[1], torch.exp(-7j * theta))


def test_a_head_without_mass_keeps_its_keys() -> None:
    theta = torch.tensor([1.0, 0.25]).double()
    mass = distances(2, 1)
    mass[1] = 0
    phi = characteristic(mass, theta)
    assert torch.equal(phi[1], torch.ones(2, dtype=torch.complex128))


def test_characteristic_takes_any_shape() -> None:
    mass, omega = distances(3, 2), torch.rand(2, 5).double()
    flat = characteristic(mass, omega.flatten())
    assert torch.equal(characteristic(mass, omega), flat.view(3, 2, 5))


@settings(deadline=None, max_examples=30)
@given(heads=st.integers(1, 3), length=st.integers(2, 12), data=st.data(), seed=SEEDS)
def test_sum_by_distance_against_a_loop(heads: int, length: int, data: st.DataObject, seed: int) -> None:
    first = data.draw(st.integers(0, length - 1))
    generator = torch.Generator().manual_seed(seed)
    full = torch.rand(heads, length, length, generator=generator, dtype=torch.float64).tril()
    expected = torch.zeros(heads, length, dtype=torch.float64)
    for i in range(first, length):
        for j in range(i + 1):
            expected[:, i - j] += full[:, i, j]
    torch.testing.assert_close(sum_by_distance(full[:, first:], first), expected)


@pytest.mark.parametrize("layout", ["mha", "gqa"])
def test_phase_pays_where_rotation_is_lost(layout: str) -> None:
    """Half the rotary slots, no rank cut: the default method loses far less than phase one does."""
    totals = dict.fromkeys(("calibrated", "transmla"), 0.0)
    methods = scan("transmla.core.methods", "METHOD")
    for seed in range(3):
        layer = observed(make_layer(layout, seed=seed))
        for name in totals:
            plan = make_plan(layer.spec, name, (0, 2), HIDDEN, methods[name].freqfold(2))
            totals[name] += layer.error(methods[name].factorize(layer.weights, layer.stats, plan))
    assert totals["calibrated"] <= 0.8 * totals["transmla"]
