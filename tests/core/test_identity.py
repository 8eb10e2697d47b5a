"""With all slots and full rank, every method reproduces the source's attention for every layout of heads.

The tests also cover the steps after the method: padding, full-rank query compression and the native layout.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.random_layer import LAYOUTS, Layer, make_layer, make_plan, relative, uncut

from transmla.artifacts import LayerFactors, MLAShape, Plan
from transmla.convert.factorize import factorize
from transmla.core.factors import pad_factors
from transmla.core.norm_identity import NormIdentity
from transmla.core.reference_attention import absorbed_attention, expanded_attention
from transmla.formats.native_layout import INPUT_SCALE, export_tensors, layer_factors, layer_tensors
from transmla.registry import scan

METHODS = scan("transmla.core.methods", "METHOD")
EXACT = 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gain", [1.0, 1.14])
def test_uncut_layer_equals_the_source(method: str, layout: str, gain: float) -> None:
    """``gain`` is yarn's attention factor."""
    layer = make_layer(layout, attention_factor=gain)
    factors = METHODS[method].factorize(layer.weights, layer.stats, uncut(layer.spec, method))
    source = layer.source()
    assert relative(expanded_attention(layer.x, factors), source) <= EXACT
    assert relative(absorbed_attention(layer.x, factors), source) <= EXACT


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_uncut_layer_is_exact_on_other_inputs(method: str, layout: str) -> None:
    """The identity does not depend on the calibration inputs."""
    layer = make_layer(layout)
    factors = METHODS[method].factorize(layer.weights, layer.stats, uncut(layer.spec, method))
    assert replace(layer, x=3 * torch.randn_like(layer.x)).error(factors) <= EXACT


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_full_query_rank_are_exact(method: str, layout: str) -> None:
    layer = make_layer(layout)
    plan = uncut(layer.spec, method)
    unpadded = plan.shape
    shape = MLAShape(
        unpadded.kv_lora_rank + 5,
        unpadded.qk_rope_head_dim,
        unpadded.qk_nope_head_dim + 4,
        unpadded.v_head_dim + 3,
        layer.spec.hidden_size,
        unpadded.latent_rank,
    )
    factors = pad_factors(factorize(layer.weights, layer.stats, replace(plan, shape=shape)), shape)
    assert factors.latent.shape[0] == shape.kv_lora_rank
    assert factors.k_up.shape[1:] == (shape.qk_nope_head_dim, shape.kv_lora_rank)
    assert factors.v_up.shape[1:] == (shape.v_head_dim, shape.kv_lora_rank)
    assert factors.q_latent is not None
    assert layer.error(factors) <= EXACT
    assert relative(absorbed_attention(layer.x, factors), layer.source()) <= EXACT


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [8, 12])
def test_a_latent_as_wide_as_the_values_is_enough_for_one_head(method: str, rank: int) -> None:
    """The rotary key holds the only key head completely, so rounding errors of the keys must take no latent channel."""
    layer = make_layer("mqa")
    plan = make_plan(layer.spec, method, tuple(range(4)), rank)
    factors = METHODS[method].factorize(layer.weights, layer.stats, plan)
    assert layer.error(factors) <= 1e-7


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_latent_holds_all_keys_without_rotation(method: str, layout: str) -> None:
    """With frequencies near zero, keys outside the rotary slot lose nothing; gain and scale stay correct."""
    layer = make_layer(layout, attention_factor=1.14)
    layer = replace(layer, spec=replace(layer.spec, inv_freq=(1e-12,) * 4))
    plan = make_plan(layer.spec, method, (0,), uncut(layer.spec, method).shape.kv_lora_rank, 4)
    factors = METHODS[method].factorize(layer.weights, layer.stats, plan)
    # The ridge separates slots that do not rotate from the latent. Its relative error is a few 1e-6.
    assert layer.error(factors) <= 1e-5


def read_back(factors: LayerFactors, plan: Plan, layer: Layer) -> LayerFactors:
    """Write factors in the native layout in the plan's precision, and read them back to float64."""
    tensors, scale = export_tensors(factors, plan, lambda: iter(layer.x.float()[:, None]))
    assert 0 < scale.mean_square <= scale.max_square
    return layer_factors(
        tensors, layer.spec.num_attention_heads, plan.shape, factors.inv_freq, factors.rope_gain, INPUT_SCALE
    )


SHAPES = {
    "half": MLAShape(12, 4, 8, 8),
    "full-rope": MLAShape(20, 8, 8, 8),
    "padded": MLAShape(24, 8, 12, 16, None, 16),
    "queries": MLAShape(16, 4, 8, 8, 14),
    "both": MLAShape(20, 4, 10, 9, 20, 13),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_layout_round_trip(method: str, layout: str, shape: str) -> None:
    """Compare all products that the attention forms from the factors, after an export to float32."""
    layer = make_layer(layout, attention_factor=1.1)
    slots = tuple(range(0, 4, 8 // SHAPES[shape].qk_rope_head_dim))
    plan = replace(make_plan(layer.spec, method, slots, 1, 4 // len(slots)), shape=SHAPES[shape])
    expected = pad_factors(factorize(layer.weights, layer.stats, plan), plan.shape)
    exported = read_back(expected, plan, layer)

    def products(f: LayerFactors) -> list[torch.Tensor]:
        query = torch.cat([f.q_nope, f.rope_gain * f.q_pe], 1) * f.scaling
        return [
            query if f.q_latent is None else query @ f.q_latent,
            f.k_up @ f.latent,
            f.v_up @ f.latent,
            f.rope,
            f.o,
            expanded_attention(layer.x, f),
            absorbed_attention(layer.x, f),
        ]

    # A runtime applies the gain through cos and sin; here the gain is part of the queries.
    for actual, product in zip(products(exported), products(expected), strict=True):
        assert relative(actual, product) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_layout_equals_the_rounded_factors(layout: str) -> None:
    layer = make_layer(layout)
    plan = replace(make_plan(layer.spec, next(iter(METHODS)), (0, 1, 2, 3), 16), dtype="bfloat16")
    factors = factorize(layer.weights, layer.stats, plan)
    exported = read_back(factors, plan, layer)
    for name in ("latent", "k_up", "v_up", "rope", "o"):
        assert relative(getattr(exported, name), getattr(factors, name)) <= 2**-8


def test_export_includes_the_readout_of_both_norms() -> None:
    layer = make_layer("gqa")
    shape = MLAShape(12, 4, 8, 8, 14)
    plan = replace(make_plan(layer.spec, next(iter(METHODS)), (0, 2), 1, 2), shape=shape)
    factors = factorize(layer.weights, layer.stats, plan)
    kv_norm, q_norm = NormIdentity(2.0**-9, 0.5, 1.25), NormIdentity(2.0**-8, 0.25, 1.5)
    tensors = layer_tensors(factors, shape, kv_norm, q_norm, torch.float64)
    exported = layer_factors(tensors, 6, shape, factors.inv_freq, 1.0, INPUT_SCALE)
    # ``layer_factors`` treats each norm as a division by sqrt(1e-6) and a product with the norm's weight.
    for norm, actual, product in (
        (kv_norm, exported.v_up @ exported.latent, factors.v_up @ factors.latent),
        (q_norm, exported.q_pe @ exported.q_latent / shape.qk_head_dim**0.5, factors.q_pe @ factors.q_latent * 8**-0.5),
    ):
        assert relative(actual, product * (norm.scale * norm.weight * norm.readout * 1e3)) <= 1e-12
