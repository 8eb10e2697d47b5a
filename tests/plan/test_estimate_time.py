"""The estimated times are near those that one H200 took, and follow settings and sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from transmla.artifacts import Plan
from transmla.plan.estimate import parameters
from transmla.plan.estimate_time import Rates, conversion_seconds, healing_seconds, measure_rates
from transmla.plan.fit_settings import FITS, fit_settings
from transmla.plan.make_plan import make_plan
from transmla.recipe import parse_recipe
from transmla.source.describe import describe

H200 = Rates("cuda", matrix=450e12, exact=50e12, memory=4.2e12)
FULL = FITS["full"]
# Seconds of "converting layers" and "healing" in scripts/results/defaults/ and layer_speed/: commit 847697d,
# and for models with experts 3d99ce5 and 44a2328.
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOLLM2 |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192}
QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN |= {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
GEMMA = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4}
GEMMA |= {"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "sliding_window": 512}
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 8, "vocab_size": 1024, "max_position_embeddings": 8192}
EXPERTS = {"num_hidden_layers": 2, "vocab_size": 1024, "num_attention_heads": 32}
QWEN_MOE = EXPERTS | {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128}
QWEN_MOE |= {"num_experts_per_tok": 8, "num_key_value_heads": 4, "head_dim": 128}
MIXTRAL = EXPERTS | {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2}
MIXTRAL |= {"num_key_value_heads": 8, "max_position_embeddings": 32768}
GPT_OSS = EXPERTS | {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4}
GPT_OSS |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128}
MEASURED = [
    ("llama", SMOLLM2, 123.1, 73.7),
    ("qwen2", QWEN, 152.7, 146.2),
    ("gemma3_text", GEMMA, 160.5, 175.4),
    ("llama", LLAMA, 129.4, None),
    ("qwen3_moe", QWEN_MOE, 44.3, None),
    ("mixtral", MIXTRAL, 49.1, None),
    ("gpt_oss", GPT_OSS, 39.1, None),
]


def plan_of(family: str, settings: dict[str, Any]) -> Plan:
    spec = describe(AutoConfig.for_model(family, **settings))
    recipe = parse_recipe({"source": "x", "output": "y", "cache_ratio": 0.5, "reconstruct": "full"}, "test")
    return make_plan(spec, recipe, "bfloat16", unfitted_because=None)


@pytest.mark.parametrize(("family", "settings", "layers", "healing"), MEASURED)
def test_estimates_are_near_what_was_measured(
    family: str, settings: dict[str, Any], layers: float, healing: float | None
) -> None:
    plan = plan_of(family, settings)
    # The Llama's layers were fitted with all steps, which layers of its size no longer take.
    fit = fit_settings("full", 0.5, experts=True) if plan.spec.experts else FULL
    estimated = conversion_seconds(plan, 64, 8192, fit, H200)
    assert estimated == pytest.approx(layers, rel=0.35)
    if healing is not None:
        seconds = healing_seconds(parameters(plan), plan.spec, 10_000_000, 16 * 1024, H200)
        assert seconds == pytest.approx(healing, rel=0.4)


def test_a_config_without_experts_may_say_how_many_a_token_passes() -> None:
    seconds = [
        conversion_seconds(plan_of("llama", settings), 64, 8192, FULL, H200)
        for settings in (SMOLLM2, SMOLLM2 | {"num_experts_per_tok": 2})
    ]
    assert seconds[0] == seconds[1]


def test_time_grows_with_what_is_asked() -> None:
    plan = plan_of("llama", SMOLLM2)
    seconds = conversion_seconds(plan, 64, 8192, FULL, H200)
    for other in (replace(FULL, steps=900), replace(FULL, tokens=8192), replace(FULL, window=3)):
        assert conversion_seconds(plan, 64, 8192, other, H200) > 1.1 * seconds
    without_mlp = conversion_seconds(plan, 64, 8192, replace(FULL, through_mlp=False), H200)
    assert conversion_seconds(plan, 64, 8192, None, H200) < without_mlp < seconds
    assert conversion_seconds(plan, 128, 8192, FULL, H200) > 1.05 * seconds
    deeper = plan_of("llama", SMOLLM2 | {"num_hidden_layers": 60})
    assert conversion_seconds(deeper, 64, 8192, FULL, H200) == pytest.approx(2 * seconds, rel=0.05)


def test_the_rates_of_this_machine_are_plausible() -> None:
    rates = measure_rates(torch.device("cpu"), torch.float32)
    assert rates.device == "cpu"
    assert all(1e8 < rate < 1e15 for rate in (rates.matrix, rates.exact, rates.memory))
