"""Nothing cut, nothing changed: in the core exactly, for every method and every layout of heads.

Also what follows the method in ``factorize``: padding, full-rank query compression and the native layout.
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
from transmla.formats.native import export_tensors, layer_factors, layer_tensors
from transmla.registry import scan

METHODS = scan("transmla.core.methods", "METHOD")
EXACT = 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gain", [1.0, 1.14])
def test_nothing_cut_is_the_source(method: str, layout: str, gain: float) -> None:
    """``gain`` is an attention factor as yarn has it."""
    layer = make_layer(layout, attention_factor=gain)
    factors = METHODS[method].factorize(layer.weights, layer.stats, uncut(layer.spec, method))
    source = layer.source()
    assert relative(expanded_attention(layer.x, factors), source) <= EXACT
    assert relative(absorbed_attention(layer.x, factors), source) <= EXACT


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unseen_inputs_are_served_as_well(method: str, layout: str) -> None:
    """An identity does not depend on what calibration saw."""
    layer = make_layer(layout)
    factors = METHODS[method].factorize(layer.weights, layer.stats, uncut(layer.spec, method))
    assert replace(layer, x=3 * torch.randn_like(layer.x)).error(factors) <= EXACT


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_and_full_query_rank_are_exact(method: str, layout: str) -> None:
    layer = make_layer(layout)
    plan = uncut(layer.spec, method)
    old = plan.shape
    shape = MLAShape(
        old.kv_lora_rank + 5,
        old.qk_rope_head_dim,
        old.qk_nope_head_dim + 4,
        old.v_head_dim + 3,
        layer.spec.hidden_size,
        old.latent_rank,
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
    """One key head fits its rotary key whole, so rounding errors of the keys may claim no latent channel."""
    layer = make_layer("mqa")
    plan = make_plan(layer.spec, method, tuple(range(4)), rank)
    factors = METHODS[method].factorize(layer.weights, layer.stats, plan)
    assert layer.error(factors) <= 1e-7


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_nothing_turns_the_latent_carries_everything(method: str, layout: str) -> None:
    """Frequencies of zero in effect: keys outside the rotary slot lose nothing, gain and scale included."""
    layer = make_layer(layout, attention_factor=1.14)
    layer = replace(layer, spec=replace(layer.spec, inv_freq=(1e-12,) * 4))
    plan = make_plan(layer.spec, method, (0,), uncut(layer.spec, method).shape.kv_lora_rank, 4)
    factors = METHODS[method].factorize(layer.weights, layer.stats, plan)
    # A ridge keeps slots that stand still apart from the latent; it costs a few parts in a million.
    assert layer.error(factors) <= 1e-5


def read_back(factors: LayerFactors, plan: Plan, layer: Layer) -> LayerFactors:
    """Through the native layout in the plan's precision, and back to float64."""
    tensors, scale = export_tensors(factors, plan, lambda: iter(layer.x.float()[:, None]))
    assert 0 < scale.mean_square <= scale.max_square
    return layer_factors(tensors, layer.spec.num_attention_heads, plan.shape, factors.inv_freq, factors.rope_gain)


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
    """Every product that attention forms from the factors survives the export to float32."""
    layer = make_layer(layout, attention_factor=1.1)
    slots = tuple(range(0, 4, 8 // SHAPES[shape].qk_rope_head_dim))
    plan = replace(make_plan(layer.spec, method, slots, 1, 4 // len(slots)), shape=SHAPES[shape])
    wanted = pad_factors(factorize(layer.weights, layer.stats, plan), plan.shape)
    got = read_back(wanted, plan, layer)

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

    # The gain sits in the runtime's cos and sin; here it is compared as part of the queries.
    for mine, theirs in zip(products(got), products(wanted), strict=True):
        assert relative(mine, theirs) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_layout_is_the_factors_rounded(layout: str) -> None:
    layer = make_layer(layout)
    plan = replace(make_plan(layer.spec, next(iter(METHODS)), (0, 1, 2, 3), 16), dtype="bfloat16")
    factors = factorize(layer.weights, layer.stats, plan)
    got = read_back(factors, plan, layer)
    for name in ("latent", "k_up", "v_up", "rope", "o"):
        assert relative(getattr(got, name), getattr(factors, name)) <= 2**-8


def test_the_readout_of_both_norms_is_folded_in() -> None:
    layer = make_layer("gqa")
    shape = MLAShape(12, 4, 8, 8, 14)
    plan = replace(make_plan(layer.spec, next(iter(METHODS)), (0, 2), 1, 2), shape=shape)
    factors = factorize(layer.weights, layer.stats, plan)
    kv_norm, q_norm = NormIdentity(2.0**-9, 0.5, 1.25), NormIdentity(2.0**-8, 0.25, 1.5)
    tensors = layer_tensors(factors, shape, kv_norm, q_norm, torch.float64)
    got = layer_factors(tensors, 6, shape, factors.inv_freq, 1.0)
    # The reader takes each norm for a division by sqrt(1e-6) and a product with its weight.
    for norm, mine, theirs in (
        (kv_norm, got.v_up @ got.latent, factors.v_up @ factors.latent),
        (q_norm, got.q_pe @ got.q_latent / shape.qk_head_dim**0.5, factors.q_pe @ factors.q_latent * 8**-0.5),
    ):
        assert relative(mine, theirs * (norm.scale * norm.weight * norm.readout * 1e3)) <= 1e-12
