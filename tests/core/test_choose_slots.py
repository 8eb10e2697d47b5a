"""Rotary slots that are chosen from statistics, and the latent for two targets."""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.core.choose_slots import choose_slots
from transmla.core.linalg import latent_basis, latent_of_two, regress
from transmla.core.phase import characteristic

HEADS, PAIRS = 2, 12


def kernel() -> tuple[Tensor, Tensor]:
    """Return frequencies [p] and ψ [p, p] for attention that falls with the distance."""
    frequencies = 100.0 ** -(torch.arange(PAIRS, dtype=torch.float64) / PAIRS)
    mass = torch.exp(-torch.arange(100, dtype=torch.float64) / 20)[None]
    phi = characteristic(mass / mass.sum(), frequencies)[0]
    return frequencies, characteristic(mass / mass.sum(), frequencies[:, None] - frequencies)[0] - phi[
        :, None
    ] * phi.conj()


def unexplained(mix: Tensor, slots: tuple[int, ...], covariance: Tensor, psi: Tensor) -> float:
    """Return the share of the rotation's energy that regression on the slots leaves."""
    every, chosen = torch.arange(HEADS * PAIRS) % PAIRS, list(slots)
    cross = (covariance @ mix.mH) * psi[every][:, chosen]
    gram = (mix @ covariance @ mix.mH) * psi[chosen][:, chosen]
    explained = (cross @ torch.linalg.pinv(gram, hermitian=True) @ cross.mH).trace().real
    return float(1 - explained / (covariance.diagonal() * psi[every, every]).sum().real)


def test_slots_go_to_the_channels_with_energy() -> None:
    """Two strong channels of one frequency get two slots, and nothing remains."""
    _, psi = kernel()
    energy = torch.zeros(HEADS, PAIRS, dtype=torch.float64)
    energy[:, 3] = 1
    covariance = torch.diag(energy.flatten()).to(psi.dtype)
    mix, slots = choose_slots(covariance, torch.ones_like(energy), psi, 2)
    assert slots == (3, 3)
    assert unexplained(mix, slots, covariance, psi) < 1e-4


def test_more_slots_leave_less() -> None:
    """The unexplained energy falls with every slot, and slots are in ascending order."""
    _, psi = kernel()
    root = torch.randn(24, 24, dtype=psi.dtype, generator=torch.Generator().manual_seed(0))
    weight, left = torch.ones(HEADS, PAIRS, dtype=torch.float64), [1.0]
    for count in (1, 3, 8, 16):
        mix, slots = choose_slots(root @ root.mH, weight, psi, count)
        assert list(slots) == sorted(slots)
        assert len(slots) == count
        left.append(unexplained(mix, slots, root @ root.mH, psi))
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.2


def test_latent_of_two_targets() -> None:
    """With equal moments it equals the optimum in closed form; with different ones it improves on a common moment."""
    generator = torch.Generator().manual_seed(0)
    first, second, a, b = (torch.randn(n, 10, dtype=torch.float64, generator=generator) for n in (8, 6, 30, 30))
    b = b * torch.linspace(0.1, 3, 10, dtype=torch.float64)
    moments = a.mT @ a, b.mT @ b

    def error(latent: Tensor, moments: tuple[Tensor, Tensor]) -> float:
        total = 0.0
        for target, moment in zip((first, second), moments, strict=True):
            rest = target - regress(target, latent, moment) @ latent
            total += float((rest @ moment * rest).sum())
        return total

    joint = latent_basis(torch.cat([first, second]), moments[0], 4)
    equal = latent_of_two(first, second, (moments[0], moments[0]), 4)
    assert abs(error(equal, (moments[0],) * 2) / error(joint, (moments[0],) * 2) - 1) < 1e-9
    mean = latent_basis(torch.cat([first, second]), moments[0] + moments[1], 4)
    assert error(latent_of_two(first, second, moments, 4), moments) < error(mean, moments)
