"""What `transmla plan` says of each runtime, by shape and rotary scaling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers.tiny_sources import build_model

from transmla.formats.runtimes import MLX_LAYERS, Runtime, native_runtimes, vllm_refuses
from transmla.plan.make_plan import make_plan
from transmla.recipe import parse_recipe
from transmla.source.describe import describe


def runtimes(layers: int = 3, activation: str = "silu", **settings: Any) -> dict[str, Runtime]:
    spec = describe(build_model("llama", "gqa", head_dim=64).config)
    spec = replace(spec, num_hidden_layers=layers, hidden_act=activation)
    recipe = parse_recipe({"source": "s", "output": "o", "reconstruct": "off", **settings}, "test")
    return {runtime.name: runtime for runtime in native_runtimes(make_plan(spec, recipe, "float32"))}


@pytest.mark.parametrize(
    ("rank", "rotary", "gpu", "cpu"),
    [(512, 64, True, True), (256, 64, True, False), (160, 32, False, False), (512, 32, False, False)],
)
def test_vllm_takes_the_rows_of_its_kernels(rank: int, rotary: int, gpu: bool, cpu: bool) -> None:
    assert (vllm_refuses(rank, rotary, cpu=False) is None, vllm_refuses(rank, rotary, cpu=True) is None) == (gpu, cpu)


def test_other_rows_need_an_option_of_vllm_that_costs_the_saving() -> None:
    vllm = runtimes()["vLLM"]
    assert vllm.flag == "VLLM_MLA_DISABLE=1"
    assert "not" in vllm.note
    assert "× the source's" in vllm.note


@pytest.mark.parametrize(("rank", "cpu"), [(512, True), (256, False)])
def test_a_padded_export_says_where_vllm_takes_it(rank: int, cpu: bool) -> None:
    vllm = runtimes(pad_for="vllm", kv_lora_rank=rank, allow_no_saving=True)["vLLM"]
    assert (vllm.accepts, vllm.flag) == (True, "")
    assert ("GPUs and CPUs" in vllm.note) == cpu


def test_mlx_drops_layers_of_deep_models() -> None:
    assert runtimes(MLX_LAYERS)["MLX"].accepts
    assert not runtimes(MLX_LAYERS + 1)["MLX"].accepts


def test_llama_cpp_takes_plain_models() -> None:
    assert runtimes()["llama.cpp"].accepts
    assert runtimes(q_lora_rank=64)["llama.cpp"].accepts
    assert runtimes(27)["llama.cpp"].accepts


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"activation": "gelu_pytorch_tanh"}, "its MLPs use silu"),
        ({"layers": 27, "q_lora_rank": 64}, "takes a model of this depth as DeepSeek-V2-Lite"),
    ],
)
def test_plan_names_what_llama_cpp_cannot_compute(settings: dict[str, Any], says: str) -> None:
    found = runtimes(**settings)["llama.cpp"]
    assert not found.accepts
    assert says in found.note
