"""Calibrated phase and joint read-out, compared with direct least squares over all distances."""

from __future__ import annotations

import pytest
import torch
from helpers.random_layer import HIDDEN, make_layer, make_plan, observed, second_moment
from hypothesis import given, settings
from hypothesis import strategies as st

from transmla.artifacts import RotaryPlan
from transmla.convert.observe import sum_by_distance
from transmla.core.concentrate import concentrate
from transmla.core.phase import characteristic
from transmla.core.readout import Distances, joint_readout
from transmla.registry import scan

SEEDS = st.integers(0, 10_000)
LENGTH = 40


def distances(heads: int, seed: int, length: int = LENGTH) -> torch.Tensor:
    """Return random distance distributions [H, T], some of them wide and some concentrated."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(heads, length, generator=generator, dtype=torch.float64) ** 6
    return mass / mass.sum(-1, keepdim=True)


def least_squares(mass: torch.Tensor, channel: float, slots: tuple[float, ...]) -> tuple[torch.Tensor, float]:
    """Return the complex constants that minimise E(Re c·(e^{−iθΔ} − Σ constant·e^{−iθ_sΔ}))², and the minimum.

    c takes the values 1, i, −1, −i with equal weight at every Δ, so it is circular and independent of Δ.
    """
    delta = torch.arange(len(mass), dtype=torch.float64)
    product = torch.tensor([1, 1j, -1, -1j], dtype=torch.complex128)[:, None]
    root = (mass / 4).sqrt()
    columns = [product * torch.exp(-1j * slot * delta) for slot in slots]
    # Re(c·w) = Re c·Re w − Im c·Im w gives two real unknowns for each complex constant.
    design = torch.stack([part for z in columns for part in (z.real * root, -z.imag * root)], -1)
    target = (product * torch.exp(-1j * channel * delta)).real * root
    solution = torch.linalg.lstsq(design.flatten(0, 1), target.reshape(-1, 1)).solution
    error = float((design.flatten(0, 1) @ solution - target.reshape(-1, 1)).square().sum())
    return torch.complex(solution[0::2, 0], solution[1::2, 0]), error


@settings(deadline=None, max_examples=30)
@given(theta=st.floats(0.0, 3.1), seed=SEEDS)
def test_characteristic_is_the_best_constant(theta: float, seed: int) -> None:
    mass = distances(1, seed)
    phi = characteristic(mass, torch.tensor([theta], dtype=torch.float64))[0, 0]
    (best,), error = least_squares(mass[0], theta, (0.0,))
    assert complex(phi) == pytest.approx(complex(best), abs=1e-9)
    # The real part of a circular c has half of its energy.
    assert error == pytest.approx((1 - float(phi.abs()) ** 2) / 2, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(rank=st.integers(0, 3), slots=st.integers(1, 3), seed=SEEDS)
def test_joint_readout_is_least_squares(rank: int, slots: int, seed: int) -> None:
    """Compare with one solve over all tokens and distances; the ridge may add 1e-4 of the energy."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    kappa = torch.randn(1, 3, 6, generator=generator, dtype=torch.complex128)
    z = torch.randn(slots, 6, generator=generator, dtype=torch.complex128)
    latent = torch.randn(rank, 6, generator=generator, dtype=torch.float64)
    mix = torch.randn(slots, 1, 3, generator=generator, dtype=torch.complex128)
    theta, mass = torch.tensor([1.0, 0.4, 0.1]).double(), distances(2, seed)
    measured = Distances.measure(mass, theta, theta[:slots])
    from_latent, from_slots = joint_readout(kappa, latent, z, mix, second_moment(x), measured)

    delta = torch.arange(LENGTH, dtype=torch.float64)
    wave = torch.exp(-1j * theta[:, None] * delta)
    tokens = x.to(kappa.dtype)
    latent_rows = torch.einsum("nD,rD,t->ntr", tokens, latent.to(kappa.dtype), torch.ones_like(wave[0]))
    rotary_rows = torch.einsum("nD,sD,st->nts", tokens, z, wave[:slots])
    keys = torch.einsum("nD,pD,pt->ntp", tokens, kappa[0], wave)
    for head in range(2):
        root = (mass[head] / len(x)).sqrt()[:, None]
        design = (torch.cat([latent_rows, rotary_rows], -1) * root).flatten(0, 1)
        target = (keys * root).flatten(0, 1)
        best = design @ torch.linalg.lstsq(design, target, driver="gelsd").solution - target
        error = design @ torch.cat([from_latent[head], from_slots[head]], -1).mT - target
        energy = float(target.abs().square().sum())
        assert float(error.abs().square().sum()) <= float(best.abs().square().sum()) + 1e-4 * energy


@pytest.mark.parametrize("heads", [1, 3])
def test_keys_that_the_slots_hold_completely_are_exact(heads: int) -> None:
    """The ridge does not change these keys, and their read-out does not use the latent."""
    generator = torch.Generator().manual_seed(heads)
    kappa = torch.randn(heads, 3, 6, generator=generator, dtype=torch.complex128)
    moment = second_moment(torch.randn(30, 6, generator=generator, dtype=torch.float64))
    latent = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    slots, theta = [f for f in range(3) for _ in range(heads)], torch.tensor([1.0, 0.4, 0.1]).double()
    kept = concentrate(kappa, moment, torch.ones(heads, 3).double(), RotaryPlan(tuple(slots), 1))
    measured = Distances.measure(distances(2 * heads, 0), theta, theta[slots])
    from_latent, from_slots = joint_readout(kappa, latent, kept.z, kept.mix, moment, measured)
    assert float(from_latent.abs().max()) <= 1e-8
    for head in range(2 * heads):
        # Each channel is read from the slots of its frequency only.
        torch.testing.assert_close(from_slots[head] @ kept.z, kappa[head // 2], atol=1e-8, rtol=0)
        assert float((from_slots[head] * ~measured.has_slot).abs().max()) <= 1e-8


def test_constant_is_exact_for_one_distance() -> None:
    """If a head attends to one distance only, a constant replaces the rotation exactly."""
    mass = torch.zeros(2, LENGTH).double()
    mass[0, 0] = mass[1, 7] = 1
    theta = torch.tensor([1.0, 0.25]).double()
    phi = characteristic(mass, theta)
    torch.testing.assert_close(phi[0], torch.ones(2, dtype=torch.complex128))
    torch.testing.assert_close(phi[1], torch.exp(-7j * theta))


def test_phi_of_a_head_without_mass_is_one() -> None:
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
def test_sum_by_distance_equals_a_loop(heads: int, length: int, data: st.DataObject, seed: int) -> None:
    first = data.draw(st.integers(0, length - 1))
    generator = torch.Generator().manual_seed(seed)
    full = torch.rand(heads, length, length, generator=generator, dtype=torch.float64).tril()
    expected = torch.zeros(heads, length, dtype=torch.float64)
    for i in range(first, length):
        for j in range(i + 1):
            expected[:, i - j] += full[:, i, j]
    torch.testing.assert_close(sum_by_distance(full[:, first:], first), expected)


@pytest.mark.parametrize("layout", ["mha", "gqa"])
def test_calibrated_phase_reduces_the_error(layout: str) -> None:
    """With half of the rotary slots and full rank, the default method has a far smaller error than TransMLA."""
    totals = dict.fromkeys(("calibrated", "transmla"), 0.0)
    methods = scan("transmla.core.methods", "METHOD")
    for seed in range(3):
        layer = observed(make_layer(layout, seed=seed))
        for name in totals:
            plan = make_plan(layer.spec, name, (0, 2), HIDDEN, methods[name].freqfold(2))
            totals[name] += layer.error(methods[name].factorize(layer.weights, layer.stats, plan))
    assert totals["calibrated"] <= 0.8 * totals["transmla"]
