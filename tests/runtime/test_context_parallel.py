"""Processes that share a cache compute what one process computes, and hold their shares of its rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import context_parallel as shared
from helpers.behaviour import relative
from helpers.convert_on_processes import run
from helpers.graph_models import Repeating, longer
from helpers.heal_on_two_processes import start_server
from helpers.mla_models import tiny
from transformers import DynamicCache, StaticCache

import transmla
from transmla.errors import TransmlaError
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.ranks import Ranks
from transmla.runtime.context_parallel import share_cache
from transmla.runtime.decode_graphs import DecodeGraphs
from transmla.runtime.graphed_model import use_graphs
from transmla.runtime.latent_attention import LatentAttention
from transmla.runtime.split_cache import SplitLayer, grow_cache, merge_shares

# Relative difference of two ways to add up float32 values, over four layers.
ROUNDING = 1e-5
# Most of the steps that the graphs of a model may take.
MOST_STEPS = 250
FLOAT8 = "float8_e4m3fn"


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    start_server()


def compare(found: dict[str, Any], expected: dict[str, Any], rounding: float) -> None:
    """Fail if results of a process differ from those of one process alone."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("tokens"):
            assert torch.equal(found[name], value), name
        elif name.startswith("logits"):
            assert relative(found[name], value) < rounding, name


@pytest.mark.parametrize(
    ("family", "size", "cache_dtype"),
    [
        ("deepseek_v3", 2, None),  # the native format
        ("deepseek_v3", 3, FLOAT8),
        ("llama", 3, None),  # the transmla format
        ("qwen3", 2, None),  # norms of queries and keys
        ("gemma2", 2, None),  # sliding windows and soft-caps
        ("gpt_oss", 3, None),  # sinks, experts
    ],
)
def test_several_processes_compute_what_one_computes(
    family: str, size: int, cache_dtype: str | None, tmp_path: Path
) -> None:
    one = shared.results(shared.shared_model(family, tmp_path, cache_dtype))
    (tmp_path / "several").mkdir()
    codes = run(size, shared.save_results, (family, cache_dtype, str(tmp_path / "several")), tmp_path / "logs")
    assert codes == [0] * size, [log.read_text()[-3000:] for log in sorted((tmp_path / "logs").iterdir())]
    several = [torch.load(tmp_path / "several" / str(rank) / "results.pt") for rank in range(size)]
    for found in several:
        compare(found, one, ROUNDING)
        graphed = family in shared.GRAPHED
        assert (found["replays"] > MOST_STEPS) == (one["replays"] > MOST_STEPS) == graphed
    if family in shared.GRAPHED:  # all layers are latent ones without windows
        assert sum(found["bytes"] for found in several) == one["bytes"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", shared.GRAPHED)
def test_two_gpus_compute_what_one_computes(family: str, tmp_path: Path) -> None:
    """Over NCCL, with steps that are captured into CUDA graphs."""
    one = shared.results(shared.shared_model(family, tmp_path, None, "cuda"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "several").mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([*launch, shared.__file__, family, str(tmp_path / "several")], check=True, env=environment)
    for rank in range(2):
        found = torch.load(tmp_path / "several" / str(rank) / "results.pt", map_location="cuda:0")
        compare(found, one, 1e-4)
        assert found["replays"] > MOST_STEPS, found["reason"]


def test_weights_outside_of_the_attention_may_be_divided(tmp_path: Path) -> None:
    """By transformers' tensor parallelism. Where it would divide the heads, the cache stays whole, or is refused."""
    tiny("deepseek_v3", first_k_dense_replace=2).save_pretrained(tmp_path / "deepseek_v3")
    tiny("minicpm3").save_pretrained(tmp_path / "minicpm3")
    assert run(2, shared.load_divided, (str(tmp_path),), tmp_path / "logs") == [0, 0], [
        log.read_text()[-3000:] for log in sorted((tmp_path / "logs").iterdir())
    ]


def test_mistakes_are_refused_in_all_processes(tmp_path: Path) -> None:
    assert run(2, shared.refuse_mistakes, (), tmp_path / "logs") == [0, 0], [
        log.read_text()[-3000:] for log in sorted((tmp_path / "logs").iterdir())
    ]


def test_one_process_keeps_its_cache_whole() -> None:
    model, cache = transmla.accelerate(tiny(), context_parallel=True), DynamicCache()
    with torch.no_grad():
        model(longer(model, 8), **{CACHE_ARGUMENT: cache})
        model(longer(model, 1), **{CACHE_ARGUMENT: cache})
    assert not any(isinstance(layer, SplitLayer) for layer in cache.layers)
    assert "generate" not in model.__dict__


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_share_follows_the_operations_of_transformers(rank: int) -> None:
    """Cropping, selecting and repeating, with fewer tokens than processes and with more."""
    ranks, generator = Ranks(rank, 3), torch.Generator().manual_seed(0)
    rows = torch.randn(2, 1, 20, 6, generator=generator)
    for length in (1, 2, 3, 11):
        layer = SplitLayer(ranks)
        layer.update(rows[:, :, :length, :4], rows[:, :, :length, 4:])
        assert layer.get_seq_length() == length
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([0, 2]))
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.update(rows[[1, 0], :, length:15, :4], rows[[1, 0], :, length:15, 4:])
        layer.crop(-2)
        keys, values = layer.update(rows[[1, 0], :, 13:, :4], rows[[1, 0], :, 13:, 4:])
        assert torch.equal(torch.cat([keys, values], -1), rows[[1, 0]][:, :, rank::3])
        assert layer.get_seq_length() == 20
        layer.crop(-20)
        assert layer.get_seq_length() == layer.keys.shape[2] == 0
        layer.reset()
        assert layer.get_seq_length() == 0


def test_shares_merge_to_the_attention_to_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token attends to no row at all, the second only to rows of one process."""
    scores, values = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    scores[0], scores[1, :, ::2] = float("-inf"), float("-inf")
    parts = [(scores[..., rank::2], values[rank::2]) for rank in range(2)]
    outputs = [(part.softmax(-1).nan_to_num() @ own)[None] for part, own in parts]
    sums = [part.logsumexp(-1)[None] for part, _ in parts]
    packed = [torch.cat([output, lse[..., None]], -1) for output, lse in zip(outputs, sums, strict=True)]
    monkeypatch.setattr(Ranks, "gather", lambda ranks, tensor: torch.stack(packed))
    output, lse = merge_shares(outputs[0], sums[0], Ranks(0, 2))
    assert torch.allclose(output[0], scores.softmax(-1).nan_to_num() @ values)
    assert torch.allclose(lse[0], scores.logsumexp(-1))


def test_a_cache_that_is_not_dynamic_is_refused() -> None:
    model = transmla.accelerate(tiny())
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(TransmlaError, match=r"2 processes cannot share a StaticLayer; .*; leave out cache_impl"):
        grow_cache(cache, 0, Ranks(0, 2))


def test_gradients_and_shared_prefixes_are_refused() -> None:
    model, cache = transmla.accelerate(tiny()), DynamicCache()
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.ranks = Ranks(0, 2)
    model(longer(model, 8), **{CACHE_ARGUMENT: cache})
    with pytest.raises(TransmlaError, match=r"no gradients; .*; call the model under torch.no_grad\(\)"):
        model(longer(model, 8), **{CACHE_ARGUMENT: cache})
    with pytest.raises(TransmlaError, match=r"model with context_parallel; .*load the model without"):
        transmla.shared_prefix(model, longer(model, 8)[:1])


def test_a_process_whose_memory_is_full_ends() -> None:
    """Its eager step would exchange other results than the captured step of the other process."""

    class Full(Repeating):
        def rehearse(self, function: Any) -> None:
            raise torch.OutOfMemoryError

    model = transmla.accelerate(tiny(first_k_dense_replace=2))
    cache = DynamicCache(config=model.config)
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.ranks = Ranks(0, 2)
    share_cache(model, cache)
    use_graphs(model, DecodeGraphs(Full()))
    with torch.no_grad():
        model(longer(model, 8), **{CACHE_ARGUMENT: cache})
        with pytest.raises(torch.OutOfMemoryError):
            model(longer(model, 1), **{CACHE_ARGUMENT: cache})
    assert [layer.get_seq_length() for layer in cache.layers] == [8, 8]
