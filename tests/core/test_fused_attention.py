"""The fused attention and the coordinates of the fit equal the reference attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.random_layer import LAYOUTS, make_layer, make_plan, relative

from transmla.artifacts import LayerFactors, MLAShape, ScoreRules
from transmla.convert.factorize import factorize
from transmla.core import fused_attention as module
from transmla.core.factors import orthonormal_latents, pad_factors
from transmla.core.fit_coordinates import Coordinates
from transmla.core.fused_attention import fused_attention, fused_source_attention
from transmla.core.linalg import regularise
from transmla.core.reference_attention import expanded_attention, source_attention

SHAPES = [MLAShape(10, 4, 8, 8), MLAShape(24, 4, 13, 11, None, 10), MLAShape(10, 4, 8, 24, 14), MLAShape(6, 4, 8, 8)]


# Factors that read the features.
READS = ("q_nope", "q_pe", "latent", "rope")


def make_factors(layout: str, shape: MLAShape, attention_factor: float = 1.0) -> tuple[torch.Tensor, LayerFactors]:
    layer = make_layer(layout, attention_factor=attention_factor)
    plan = replace(make_plan(layer.spec, "calibrated", (0, 2), 10, 2), shape=shape)
    return layer.x, pad_factors(factorize(layer.weights, layer.stats, plan), shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_equals_expanded(layout: str, shape: MLAShape) -> None:
    x, factors = make_factors(layout, shape, attention_factor=1.2)
    assert relative(fused_attention(x, factors), expanded_attention(x, factors)) <= 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rules", [ScoreRules(), ScoreRules(window=3), ScoreRules(softcap=2.0), "sinks"])
def test_the_fused_source_equals_the_reference(layout: str, rules: ScoreRules | str) -> None:
    layer = make_layer(layout)
    if isinstance(rules, str):
        rules = ScoreRules(sinks=torch.linspace(-1, 1, layer.weights.q.shape[0], dtype=torch.float64))
    weights = replace(layer.weights, rules=rules)
    frequencies = torch.tensor(layer.spec.inv_freq, dtype=torch.float64)
    expected = source_attention(layer.x, weights, frequencies, scaling=0.3, gain=1.4)
    found = fused_source_attention(layer.x, weights, frequencies, scaling=0.3, gain=1.4)
    assert relative(found, expected) <= 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_with_gaps(layout: str) -> None:
    """Equal shifts change nothing, and twice the distances are twice the frequencies; for source and factors."""
    x, factors = make_factors(layout, SHAPES[0])
    positions = torch.arange(x.shape[1])
    assert relative(fused_attention(x, factors, positions + 7), fused_attention(x, factors)) <= 1e-12
    doubled = replace(factors, inv_freq=2 * factors.inv_freq)
    assert relative(fused_attention(x, factors, 2 * positions), fused_attention(x, doubled)) <= 1e-12
    layer = make_layer(layout)
    frequencies = torch.tensor(layer.spec.inv_freq, dtype=torch.float64)
    maps = layer.weights.q, layer.weights.k, layer.weights.v
    q, k, v = (torch.einsum("ntD,hdD->nhtd", layer.x, weights) for weights in maps)
    rest = {"scaling": 0.3, "gain": 1.4, "rules": ScoreRules()}
    expected = module.attended_heads(q, k, v, 2 * frequencies, **rest)  # type: ignore[arg-type]
    found = module.attended_heads(q, k, v, frequencies, **rest, positions=2 * positions + 3)  # type: ignore[arg-type]
    assert relative(found, expected) <= 1e-12


def test_heads_that_read_their_own_features() -> None:
    """As after q/k norms: without the zeros of the maps, the same output and the same gradients."""
    generator = torch.Generator().manual_seed(0)
    _, factors = make_factors("gqa", SHAPES[0])
    heads, own, rest = factors.k_up.shape[0], 6, 5
    width = heads * own + rest
    block = torch.arange(width) // own

    def maps(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, width, dtype=torch.float64, generator=generator)

    queries = (block == torch.arange(heads)[:, None])[:, None]
    tensors = {name: maps(*getattr(factors, name).shape[:-1]) for name in READS}
    for name, tensor in tensors.items():
        tensor *= queries if name.startswith("q_") else block >= heads
        tensor.requires_grad_()
    x, results = maps(2, 9), []
    for given in (own, None):
        mixed = fused_attention(x, replace(factors, **tensors), own=given)
        results.append([mixed.detach(), *torch.autograd.grad(mixed.square().sum(), list(tensors.values()))])
    read = [torch.ones(()), *(queries if name.startswith("q_") else block >= heads for name in READS)]
    for found, expected, where in zip(*results, read, strict=True):
        assert relative(found * where, expected * where) <= 1e-12


def test_widths_that_gpus_dislike_are_padded() -> None:
    """A source with biases has an odd number of features; the padding changes nothing."""
    _, factors = make_factors("gqa", SHAPES[2])
    factors = replace(
        factors, q_latent=None, q_nope=factors.q_nope @ factors.q_latent, q_pe=factors.q_pe @ factors.q_latent
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, factors.latent.shape[1] + 1, dtype=torch.float64, generator=generator)
    wider = {name: torch.randn(*getattr(factors, name).shape[:-1], 1, generator=generator).double() for name in READS}
    odd = replace(factors, **{name: torch.cat([getattr(factors, name), t], -1) for name, t in wider.items()})
    assert x.shape[-1] % module.ALIGNMENT
    assert relative(fused_attention(x, odd), expanded_attention(x, odd)) <= 1e-12


def test_blocks_on_a_cpu_bear_keys_with_a_large_common_part() -> None:
    """Qwen2.5's biases make scores of a thousand and more, which bfloat16 rounds by several units."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, common = (torch.randn(1, 2, n, 64, generator=generator) for n in (300, 300, 300, 1))
    q, k, v = (t.to(torch.bfloat16) for t in (q + 10 * common, k + 10 * common, v))
    exact = module.attend(*(t.double() for t in (q, k, v)), scaling=0.125)
    assert relative(module.attend(q, k, v, scaling=0.125).double(), exact) <= 0.02


@pytest.mark.parametrize("length", [1, 7, 8, 20])
def test_blocks_on_a_cpu_equal_the_whole(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients; keys and values differ in width."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, d, dtype=torch.float64, generator=generator) for d in (6, 6, 4))
    results = []
    for block, longest in ((8, 64), (64, 64), (8, 0)):  # the last uses PyTorch's kernel
        monkeypatch.setattr(module, "CPU_BLOCK", block)
        monkeypatch.setattr(module, "CPU_LENGTH", longest)
        given = [t.clone().requires_grad_() for t in (q, k, v)]
        mixed = module.attend(*given, scaling=0.4)
        results.append([mixed.detach(), *torch.autograd.grad(mixed.square().sum(), given)])
    for found, whole, fused in zip(*results, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, fused, rtol=1e-12, atol=1e-12)


def test_bfloat16_inputs_keep_exact_angles() -> None:
    """bfloat16 cannot hold positions beyond 256 or most frequencies, so rotations must not use it."""
    _, factors = make_factors("gqa", SHAPES[0])
    factors = replace(factors, inv_freq=torch.tensor([1.0, 0.3333], dtype=torch.float64))
    x = torch.randn(1, 700, factors.latent.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    half = factors.to(torch.bfloat16)
    exact = expanded_attention(x.double(), replace(half.to(torch.float64), inv_freq=factors.inv_freq))
    assert relative(fused_attention(x, half).double()[:, 512:], exact[:, 512:]) <= 0.03


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
def test_coordinates_describe_the_same_layer(shape: MLAShape) -> None:
    x, factors = make_factors("gqa9", shape)
    moment = x.flatten(0, 1).mT @ x.flatten(0, 1) / x[..., 0].numel()
    coordinates = Coordinates.of(factors, moment)
    tensors = {name: tensor.float() for name, tensor in coordinates.to_coordinates(factors).items()}
    back = coordinates.to_factors(tensors)
    assert relative(expanded_attention(x.float(), back), expanded_attention(x, factors)) <= 1e-4
    white = tensors["latent"].double() @ coordinates.shrink.double()
    covariance = white @ regularise(moment) @ white.mT
    assert relative(covariance, torch.eye(len(covariance), dtype=covariance.dtype)) <= 1e-4
    orthonormal = orthonormal_latents(back.to(torch.float64))
    assert relative(expanded_attention(x, orthonormal), expanded_attention(x, factors)) <= 1e-4
    for rows in (orthonormal.latent, orthonormal.q_latent):
        if rows is not None:
            assert relative(rows @ rows.mT, torch.eye(len(rows), dtype=rows.dtype)) <= 1e-12


def test_coordinates_survive_degenerate_inputs() -> None:
    """Input channels that are always zero give finite coordinates."""
    x, factors = make_factors("gqa", SHAPES[0])
    x = x.clone()
    x[..., 5:] = 0
    moment = x.flatten(0, 1).mT @ x.flatten(0, 1) / x[..., 0].numel()
    tensors = Coordinates.of(factors, moment).to_coordinates(factors)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
