"""The estimates for several processes: hand-computed times and sizes, and what a GPU more can and cannot do."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig

from transmla.artifacts import Plan
from transmla.convert.step_parts import part_of_step
from transmla.heal.memory import load_of
from transmla.heal.memory import memory_bytes as healing_bytes
from transmla.heal.settings import Healing
from transmla.plan.estimate import disk_bytes, export_bytes, memory_bytes, parameters
from transmla.plan.estimate_time import (
    FITTING_UNDIVIDED,
    HEALING_UNDIVIDED,
    OBSERVING_UNDIVIDED,
    SHARDED_UNDIVIDED,
    Rates,
    conversion_seconds,
    divided,
    healing_seconds,
)
from transmla.plan.fit_settings import FITS, parts_of_step
from transmla.plan.make_plan import make_plan
from transmla.ranks import Ranks
from transmla.recipe import parse_recipe
from transmla.source.describe import describe

H200 = Rates("cuda", matrix=450e12, exact=50e12, memory=4.2e12)
ONE_CPU = Rates("cpu", matrix=1e11, exact=5e10, memory=1e10)
FULL = FITS["full"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The plan of a model with SmolLM2-135M's sizes at half the cache; it has nine query heads."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    sizes |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
    recipe = parse_recipe({"source": "x", "output": "y", "cache_ratio": 0.5, "reconstruct": "full"}, "test")
    return make_plan(describe(AutoConfig.for_model("llama", **sizes)), recipe, "bfloat16")


@pytest.mark.parametrize(
    ("undivided", "one", "two"),
    [
        # Seconds of a layer, and of a token: scripts/results/layer_speed/ and healing_speed/.
        (OBSERVING_UNDIVIDED, 3.08, 1.99),
        (FITTING_UNDIVIDED, 21.48, 12.53),
        (HEALING_UNDIVIDED, 1 / 78, 1 / 132),
        (SHARDED_UNDIVIDED, 1 / 213_786, 1 / 239_751),
    ],
)
def test_two_gpus_take_what_was_measured(undivided: float, one: float, two: float) -> None:
    assert divided(one, 1, undivided) == one
    assert divided(one, 2, undivided) == pytest.approx(two, rel=0.01)


def test_four_parts_by_hand() -> None:
    assert divided(100.0, 4, 0.2) == pytest.approx(20 + 80 / 4)


def test_observing_and_fitting_are_divided_and_nothing_else(plan: Plan) -> None:
    def seconds(processes: int, *, fitted: bool) -> float:
        return conversion_seconds(plan, 64, 8192, FULL if fitted else None, H200, processes)

    closed = [seconds(n, fitted=False) for n in (1, 2, 64)]
    # With o for observing, two processes save 0.71·o/2 and 64 save 0.71·o·63/64.
    assert (closed[0] - closed[1]) / (closed[0] - closed[2]) == pytest.approx((1 / 2) / (63 / 64))
    observing = (closed[0] - closed[1]) / (0.71 / 2)
    assert 0 < observing < closed[0]
    fits = [seconds(n, fitted=True) - seconds(n, fitted=False) for n in (1, 2)]
    assert fits[0] / fits[1] == pytest.approx(1 / (0.17 + 0.83 / 2))
    assert fits[0] / fits[1] == pytest.approx(1.71, abs=0.01)


def test_the_process_with_the_most_sequences_ends_last(plan: Plan) -> None:
    two, three, four, five = (conversion_seconds(plan, 5, 512, None, H200, n) for n in (2, 3, 4, 5))
    assert two > three == four > five
    assert five == conversion_seconds(plan, 5, 512, None, H200, 6)


def test_more_processes_are_never_slower(plan: Plan) -> None:
    """As long as there is a head for each."""
    for fit in (None, *FITS.values()):
        times = [conversion_seconds(plan, 64, 8192, fit, H200, n) for n in range(1, 10)]
        assert all(after <= before for before, after in pairwise(times))
        assert times[0] == conversion_seconds(plan, 64, 8192, fit, H200)
        assert times[-1] < times[0]
    for sharded in (False, True):
        settings = parameters(plan), plan.spec, 10_000_000, 16 * 1024, H200
        times = [healing_seconds(*settings, n, sharded=sharded) for n in (1, 2, 4, 8, 16)]
        assert all(after <= before for before, after in pairwise(times))
        assert times[0] == healing_seconds(*settings)


def test_a_healing_that_the_host_does_not_bound(plan: Plan) -> None:
    weights, tokens, batch = 8_000_000_000, 2_000_000, 16 * 1024
    one, two = (healing_seconds(weights, plan.spec, tokens, batch, H200, n) - 25 for n in (1, 2))
    sharded = healing_seconds(weights, plan.spec, tokens, batch, H200, 2, sharded=True) - 25
    assert one / two == pytest.approx(1 / (0.18 + 0.82 / 2))
    assert one / sharded == pytest.approx(1 / (0.78 + 0.22 / 2))


def test_processes_on_one_cpu_share_its_cores(plan: Plan) -> None:
    assert conversion_seconds(plan, 64, 512, FULL, ONE_CPU, 4) == conversion_seconds(plan, 64, 512, FULL, ONE_CPU)


@pytest.mark.parametrize(
    ("processes", "rows", "length", "heads", "parts"),
    [
        (1, 3, 512, 9, 1),
        (2, 2, 2048, 9, 2),  # rows
        (2, 1, 8192, 9, 2),  # tokens
        (9, 1, 8192, 9, 9),
        (16, 1, 8192, 9, 1),  # fewer heads than processes
        (16, 32, 8192, 9, 16),
        (4, 2, 3, 9, 1),  # fewer tokens than processes
    ],
)
def test_parts_of_a_step(processes: int, rows: int, length: int, heads: int, parts: int) -> None:
    assert parts_of_step(processes, rows, length, heads) == parts
    part = part_of_step(Ranks(0, processes), rows, length, heads)
    whole = part.split is None and part.rows in (slice(None), slice(0, rows))
    assert whole == (parts == 1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("streams", [True, False])
def test_each_process_holds_everything(plan: Plan, device: str, streams: bool) -> None:
    one, three = (memory_bytes(plan, 4096, FULL, torch.device(device), streams=streams, processes=n) for n in (1, 3))
    assert three == 3 * one
    assert one == memory_bytes(plan, 4096, FULL, torch.device(device), streams=streams)


def test_hidden_states_on_the_disk_lie_there_once_for_each_process(plan: Plan) -> None:
    sizes = [disk_bytes(plan, 4096, FULL, streams=n) - export_bytes(plan) for n in range(4)]
    assert sizes == [sizes[0] * (1 + n) for n in range(4)]


@pytest.mark.parametrize("trainable", ["all", "attention", "lora"])
def test_more_processes_never_need_more_memory_on_each_gpu(plan: Plan, trainable: str) -> None:
    names = {"student": "s", "teacher": "t", "output": "o"}
    settings = Healing.model_validate(names | {"trainable": trainable, "batch": 16, "length": 1024})
    for sharded in (False, True):
        loads = [load_of(settings, n, half=True, sharded=sharded) for n in (1, 2, 4, 8, 16)]
        assert [load.tokens for load in loads] == [16384, 8192, 4096, 2048, 1024]
        assert [load.shards for load in loads] == ([1, 2, 4, 8, 16] if sharded else [1] * 5)
        sizes = [healing_bytes(plan, load) for load in loads]
        assert all(after < before for before, after in pairwise(sizes))


def test_shards_of_all_weights_by_hand(plan: Plan) -> None:
    """All weights: 16 bytes each (float32, gradient, two moments), of which two processes hold half."""
    names = {"student": "s", "teacher": "t", "output": "o"}
    settings = Healing.model_validate(names | {"trainable": "all", "batch": 16, "length": 1024})
    whole, shared = (healing_bytes(plan, load_of(settings, 2, half=True, sharded=s)) for s in (False, True))
    assert whole - shared == 8 * parameters(plan)
