"""A real RMSNorm between the scaled latent and the corrected read-out is an identity."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from transmla.core.norm_identity import norm_identity
from transmla.formats.native_layout import latent_scale

EPS = 1e-6
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def latents(rank: int, size: float, seed: int) -> torch.Tensor:
    """Return float32 latents [T, r] of root mean square ``size``; every fiftieth row is 30 times larger."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(400, rank, generator=generator) * size
    rows[::50] *= 30
    return rows


def through_the_norm(rows: torch.Tensor, weight: float, scale: float, readout: float) -> torch.Tensor:
    """Return the latent after a runtime's norm and read-out, in float32."""
    norm = DeepseekV3RMSNorm(rows.shape[-1], eps=EPS)
    torch.nn.init.constant_(norm.weight, weight)
    with torch.no_grad():
        return norm(rows * scale) * readout


def largest_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative error of a row."""
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@settings(deadline=None, max_examples=30)
@given(
    rank=st.sampled_from([1, 16, 100, 512]),
    power=st.integers(-12, 12),
    seed=st.integers(0, 999),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_identity_in_float32(rank: int, power: int, seed: int, dtype: str) -> None:
    rows = latents(rank, 10.0 ** (power / 4), seed)
    energy = rows.double().square().mean(-1)
    identity = norm_identity(float(energy.mean()), float(energy.max()), EPS, DTYPES[dtype])
    # The export's precision holds the weight exactly.
    assert identity.weight == torch.tensor(identity.weight, dtype=DTYPES[dtype]).double().item()
    assert math.log2(identity.scale).is_integer()
    output = through_the_norm(rows, identity.weight, identity.scale, identity.readout)
    assert largest_error(output, rows) <= 1e-6


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_readout_only_repairs_the_rounding_of_the_weight(dtype: str) -> None:
    """The latent after the norm, which is cached, keeps its size."""
    for size in (1e-3, 1.0, 77.0):
        identity = norm_identity(size**2, 5 * size**2, EPS, DTYPES[dtype])
        assert identity.readout == pytest.approx(1, abs=torch.finfo(DTYPES[dtype]).eps)


def test_scaling_rows_loses_no_bits() -> None:
    rows = latents(32, 1.0, 0)
    identity = norm_identity(1.0, 900.0, EPS, torch.bfloat16)
    for dtype in DTYPES.values():
        stored = rows.to(dtype)
        assert torch.equal((stored * identity.scale).to(dtype) / identity.scale, stored)


def test_tokens_far_larger_than_calibration_change_little() -> None:
    rows = latents(64, 1.0, 3)
    usual = rows[torch.arange(len(rows)) % 50 != 0].square().mean(-1)
    identity = norm_identity(float(usual.mean()), float(usual.max()), EPS, torch.float32)
    output = through_the_norm(rows, identity.weight, identity.scale, identity.readout)
    assert largest_error(output, rows) <= 5e-4


@pytest.mark.parametrize("largest", [0.0, -0.0, math.inf, math.nan])
def test_a_latent_without_energy(largest: float) -> None:
    """A latent without a finite, positive size gets finite scales, and zero stays zero."""
    identity = norm_identity(0.0, largest, EPS, torch.bfloat16)
    assert all(math.isfinite(value) and value > 0 for value in vars(identity).values())
    output = through_the_norm(torch.zeros(3, 8), identity.weight, identity.scale, identity.readout)
    assert float(output.abs().max()) == 0


def test_latent_scale_measures_all_tokens() -> None:
    inputs, rows = latents(12, 1.0, 7).view(4, 100, 12), torch.randn(6, 12)
    energy = (inputs @ rows.T).square().sum(-1) / 8
    scale = latent_scale(rows.double(), iter(inputs.split(3)), 8)
    assert scale.mean_square == pytest.approx(float(energy.mean()), rel=1e-5)
    assert scale.max_square == pytest.approx(float(energy.max()), rel=1e-5)
    assert scale.max_square > 10 * scale.mean_square
