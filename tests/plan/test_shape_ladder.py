"""The shapes that a conversion may choose from, and plans whose layers have different ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from transmla.convert.prepare import Prepared, plan_at, prepare
from transmla.errors import TransmlaError
from transmla.plan.estimate import contexts, parameters
from transmla.plan.shape_ladder import combined, ladder, may_keep_layers
from transmla.recipe import Recipe


@pytest.fixture
def prepared(make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]) -> Prepared:
    source = make_source("qwen2", num_hidden_layers=3)
    return prepare(make_recipe(source, cache_ratio="auto"))


def test_the_caches_fall_and_all_save_something(prepared: Prepared) -> None:
    values = [plan.model_cache_values for plan in ladder(partial(plan_at, prepared)).values()]
    assert len(values) > 3
    assert values == sorted(set(values), reverse=True)
    assert values[0] < 3 * prepared.plan.spec.cache_values


def test_the_plan_before_the_choice_is_the_largest_and_says_so(prepared: Prepared) -> None:
    largest = next(iter(ladder(partial(plan_at, prepared)).values()))
    assert prepared.plan.shape == largest.shape
    assert "keep the KL to the source at 0.1 nats per token before healing" in prepared.plan.notes[-1]


def test_layers_of_one_shape_make_the_plan_of_this_shape(prepared: Prepared) -> None:
    plans = list(ladder(partial(plan_at, prepared)).values())
    assert combined(plans, [2, 2, 2]) == plans[2]


def test_a_combined_plan_counts_what_each_layer_caches(prepared: Prepared) -> None:
    plans = list(ladder(partial(plan_at, prepared)).values())
    mixed = combined(plans, [1, None, 3])
    spec = mixed.spec
    assert mixed.kept == (1,)
    assert [mixed.at(i).shape for i in (0, 2)] == [plans[1].shape, plans[3].shape]
    assert mixed.shape == plans[1].shape
    expected = plans[1].shape.cache_values + spec.cache_values + plans[3].shape.cache_values
    assert mixed.model_cache_values == expected
    assert plans[3].cache_ratio < mixed.cache_ratio < plans[1].cache_ratio
    assert parameters(plans[3]) < parameters(mixed) < parameters(plans[0])
    assert contexts(plans[3])[24][1] > contexts(mixed)[24][1] > contexts(plans[0])[24][0]
    assert "1 of 3 layers keep the source's attention and cache" in mixed.notes


def test_layers_are_kept_where_no_runtime_is_lost(
    make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    """vLLM's plugin serves Qwen2, but no layers that keep their attention; it does not serve Gemma at all."""
    settings = {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
    gemma = make_source("gemma3_text", rope_parameters=None, name="gemma", **settings)
    qwen = make_source("qwen2", num_hidden_layers=3, name="qwen")
    llama = make_source(num_hidden_layers=3, name="llama")
    found = [may_keep_layers(prepare(make_recipe(source, cache_ratio=0.5)).plan) for source in (gemma, qwen, llama)]
    assert found == [True, False, False]


def test_no_shape_at_all_is_refused() -> None:
    def none(ratio: float) -> None:
        raise TransmlaError("too small")

    with pytest.raises(TransmlaError, match="too small"):
        ladder(none)  # type: ignore[arg-type]
