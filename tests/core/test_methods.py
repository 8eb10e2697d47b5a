"""Properties that every conversion method must have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.random_layer import HIDDEN, LAYOUTS, WIDTH, Layer, make_layer, make_plan, measure, relative, uncut
from torch import Tensor

from transmla.artifacts import LayerFactors, LayerStats, LayerWeights, Plan
from transmla.core.methods.base import Method
from transmla.core.reference_attention import expanded_attention
from transmla.plan.freqfold import check_fold
from transmla.registry import scan

METHODS = scan("transmla.core.methods", "METHOD")
PAIRS = WIDTH // 2


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


def half(layer: Layer, method: Method, rank: int = 12) -> Plan:
    """Return a plan with a slot for every second frequency and the method's preferred fold."""
    return make_plan(layer.spec, method.name, tuple(range(0, PAIRS, 2)), rank, min(method.freqfold(2), PAIRS))


def tensors(value: LayerFactors | LayerWeights | LayerStats) -> dict[str, Tensor]:
    """Return the tensor fields by name."""
    return {name: t for name, t in vars(value).items() if isinstance(t, Tensor)}


def recalibrated(layer: Layer, x: Tensor) -> Layer:
    """Return the layer with ``x`` as its calibration inputs."""
    return replace(layer, x=x, stats=measure(x, layer.stats.distance_mass))


def constant_channel(layer: Layer) -> Layer:
    x = layer.x.clone()
    x[..., 0] = 50.0
    return recalibrated(layer, x)


def few_directions(layer: Layer) -> Layer:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(3, HIDDEN, generator=generator, dtype=torch.float64)
    return recalibrated(layer, layer.x[..., :3] @ basis)


def one_token(layer: Layer) -> Layer:
    return recalibrated(layer, layer.x[:1, :1].expand(2, 5, HIDDEN))


def dead_head(layer: Layer) -> Layer:
    """Set the first key/value head and all query heads that read it to zero."""
    group = layer.spec.group_size
    copies = {name: t.clone() for name, t in tensors(layer.weights).items()}
    for name, t in copies.items():
        t[: group if name in "qo" else 1] = 0
    return replace(layer, weights=LayerWeights(**copies))


def dead_queries(layer: Layer) -> Layer:
    return replace(layer, weights=replace(layer.weights, q=torch.zeros_like(layer.weights.q)))


def dead_keys(layer: Layer) -> Layer:
    return replace(layer, weights=replace(layer.weights, k=torch.zeros_like(layer.weights.k)))


def dead_values(layer: Layer) -> Layer:
    return replace(layer, weights=replace(layer.weights, v=torch.zeros_like(layer.weights.v)))


def sink_only(layer: Layer) -> Layer:
    return replace(layer, stats=replace(layer.stats, distance_mass=torch.zeros_like(layer.stats.distance_mass)))


def one_sink_head(layer: Layer) -> Layer:
    mass = layer.stats.distance_mass.clone()
    mass[0] = 0
    return replace(layer, stats=replace(layer.stats, distance_mass=mass))


DEGENERATE = [
    constant_channel,
    few_directions,
    one_token,
    dead_head,
    dead_queries,
    dead_keys,
    dead_values,
    sink_only,
    one_sink_head,
]


@pytest.mark.parametrize("change", DEGENERATE)
@pytest.mark.parametrize("layout", ["gqa", "mqa"])
def test_degenerate_layers_give_finite_factors(method: Method, change: Callable[[Layer], Layer], layout: str) -> None:
    """Factors are finite in float32 and not too large for sums in bfloat16."""
    layer = change(make_layer(layout))
    for plan in (half(layer, method), uncut(layer.spec, method.name)):
        factors = method.factorize(layer.weights, layer.stats, plan)
        for name, tensor in tensors(factors).items():
            assert bool(tensor.float().isfinite().all()), name
            assert float(tensor.abs().max()) < 1e12, name
        single = LayerFactors(**{k: v.float() if isinstance(v, Tensor) else v for k, v in vars(factors).items()})
        assert bool(expanded_attention(layer.x.float(), single).isfinite().all())


@pytest.mark.parametrize("change", [constant_channel, few_directions, dead_head, dead_keys, sink_only, one_sink_head])
@pytest.mark.parametrize("layout", ["gqa", "mqa"])
def test_degenerate_layers_stay_exact_when_nothing_is_cut(
    method: Method, change: Callable[[Layer], Layer], layout: str
) -> None:
    layer = change(make_layer(layout))
    factors = method.factorize(layer.weights, layer.stats, uncut(layer.spec, method.name))
    assert layer.error(factors) <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_follow_the_plan(method: Method, layout: str) -> None:
    layer = make_layer(layout)
    factors = method.factorize(layer.weights, layer.stats, half(layer, method, rank=10))
    heads = layer.spec.num_attention_heads
    assert {name: tuple(t.shape) for name, t in tensors(factors).items()} == {
        "q_nope": (heads, WIDTH, HIDDEN),
        "q_pe": (heads, PAIRS, HIDDEN),
        "latent": (10, HIDDEN),
        "rope": (PAIRS, HIDDEN),
        "k_up": (heads, WIDTH, 10),
        "v_up": (heads, WIDTH, 10),
        "o": (heads, HIDDEN, WIDTH),
        "inv_freq": (PAIRS // 2,),
    }
    assert factors.inv_freq.tolist() == list(layer.spec.inv_freq[::2])
    assert all(t.dtype == torch.float64 for t in tensors(factors).values())


@pytest.mark.parametrize("layout", ["gqa", "mqa"])
def test_deterministic_and_pure(method: Method, layout: str) -> None:
    layer, untouched = make_layer(layout), make_layer(layout)
    runs = [tensors(method.factorize(layer.weights, layer.stats, half(layer, method))) for _ in range(2)]
    assert all(torch.equal(t, runs[1][name]) for name, t in runs[0].items())
    for current, original in ((layer.weights, untouched.weights), (layer.stats, untouched.stats)):
        assert all(torch.equal(t, tensors(original)[name]) for name, t in tensors(current).items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_falls_as_rank_grows(method: Method, layout: str) -> None:
    """With all rotary channels, only the latent's rank limits the error; compare sums over random layers."""
    ranks = [2, 6, 12, 20, 28, 36]
    totals = [0.0] * len(ranks)
    for seed in range(4):
        layer = make_layer(layout, seed=seed)
        whole = uncut(layer.spec, method.name)
        full = whole.shape.latent_rank
        for i, rank in enumerate(ranks):
            plan = replace(whole, shape=replace(whole.shape, kv_lora_rank=min(rank, full), latent_rank=min(rank, full)))
            totals[i] += layer.error(method.factorize(layer.weights, layer.stats, plan))
    assert all(after <= before + 1e-9 for before, after in pairwise(totals)), totals
    assert totals[-1] <= 1e-8 < totals[0]


@pytest.mark.parametrize("layout", ["mha", "gqa", "gqa9"])
def test_the_order_of_heads_does_not_matter(method: Method, layout: str) -> None:
    """Permuting key/value heads together with their groups of query heads gives the same attention."""
    layer = make_layer(layout)
    kv_heads, group = layer.spec.num_key_value_heads, layer.spec.group_size
    order = torch.arange(kv_heads).roll(1)
    queries = (order[:, None] * group + torch.arange(group)).flatten()
    w = layer.weights
    weights = LayerWeights(w.q[queries], w.k[order], w.v[order], w.o[queries])
    stats = replace(layer.stats, distance_mass=layer.stats.distance_mass[queries])
    plan = half(layer, method)
    plain = expanded_attention(layer.x, method.factorize(layer.weights, layer.stats, plan))
    permuted = expanded_attention(layer.x, method.factorize(weights, stats, plan))
    assert relative(permuted, plain) <= 1e-7


@pytest.mark.parametrize("layout", ["mha", "gqa"])
def test_the_basis_of_the_input_does_not_matter(method: Method, layout: str) -> None:
    """Rotating inputs and weights by the same orthogonal matrix does not change the scores and values."""
    layer = make_layer(layout)
    generator = torch.Generator().manual_seed(5)
    q = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, dtype=torch.float64, generator=generator)).Q
    w = layer.weights
    weights = LayerWeights(w.q @ q.mT, w.k @ q.mT, w.v @ q.mT, w.o)
    stats = replace(
        layer.stats,
        second_moment=q @ layer.stats.second_moment @ q.mT,
        attended_moment=q @ layer.stats.attended_moment @ q.mT,
    )
    plan = half(layer, method, rank=10)
    plain = expanded_attention(layer.x, method.factorize(layer.weights, layer.stats, plan))
    rotated = expanded_attention(layer.x @ q.mT, method.factorize(weights, stats, plan))
    assert relative(rotated, plain) <= 1e-6


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_the_preferred_fold_is_valid(method: Method, stride: int) -> None:
    check_fold(min(method.freqfold(stride), 32), stride, 32)
