"""The widths that a cache ratio chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from transmla.errors import TransmlaError
from transmla.formats.base import format_named
from transmla.kernels import DecodeShape, hopper
from transmla.plan.make_plan import KERNEL_MULTIPLE, make_plan
from transmla.recipe import parse_recipe
from transmla.source.describe import describe

SMOLLM2 = LlamaConfig(
    hidden_size=576, num_hidden_layers=3, num_attention_heads=9, num_key_value_heads=3, rope_theta=100_000.0
)
QWEN = {"num_hidden_layers": 3, "num_key_value_heads": 2}
QWEN_0_5B = Qwen2Config(hidden_size=896, num_attention_heads=14, **QWEN)
QWEN_1_5B = Qwen2Config(hidden_size=1536, num_attention_heads=12, **QWEN)
# Heads of 100 channels, a quarter of which is odd.
OPENLLAMA_3B = LlamaConfig(hidden_size=3200, num_hidden_layers=3, num_attention_heads=32, num_key_value_heads=32)
LLAMA_8B = LlamaConfig(hidden_size=4096, num_hidden_layers=3, num_attention_heads=32, num_key_value_heads=8)


@pytest.mark.parametrize(
    ("config", "ratio", "fit", "widths"),
    [
        (SMOLLM2, 0.5, "full", (32, 160)),
        (SMOLLM2, 1 / 3, "full", (16, 112)),
        (SMOLLM2, 0.25, "full", (16, 80)),
        (SMOLLM2, 0.125, "full", (16, 32)),
        (SMOLLM2, 0.5, "off", (64, 128)),
        (QWEN_0_5B, 0.5, "full", (16, 112)),
        (QWEN_0_5B, 0.5, "fast", (16, 112)),
        (QWEN_0_5B, 0.25, "full", (16, 48)),
        (QWEN_0_5B, 0.5, "off", (64, 64)),
        (QWEN_1_5B, 0.5, "full", (32, 224)),
        (LLAMA_8B, 0.5, "full", (64, 960)),
        (OPENLLAMA_3B, 0.25, "full", (50, 1536)),
        (OPENLLAMA_3B, 0.25, "off", (50, 1536)),
    ],
)
def test_a_fitted_export_has_a_narrow_rotary_key(config: Any, ratio: float, fit: str, widths: tuple[int, int]) -> None:
    recipe = parse_recipe({"source": "x", "output": "y", "cache_ratio": ratio, "reconstruct": fit}, "test")
    shape = make_plan(describe(config), recipe, "bfloat16").shape
    assert (shape.qk_rope_head_dim, shape.kv_lora_rank) == widths


@pytest.mark.parametrize(
    ("config", "changes", "widths"),
    [
        (QWEN_1_5B, {"cache_ratio": 0.7}, (256, 64)),
        (QWEN_1_5B, {"cache_ratio": 0.5}, (256, 64)),
        (QWEN_1_5B, {"kv_lora_rank": 200, "qk_rope_head_dim": 32}, (256, 32)),
        (LLAMA_8B, {"cache_ratio": 0.5}, (512, 64)),
        (LLAMA_8B, {"cache_ratio": 0.2}, (256, 64)),
    ],
)
def test_padding_for_vllm_chooses_served_widths_without_zeros_in_the_transmla_format(
    config: Any, changes: dict[str, Any], widths: tuple[int, int]
) -> None:
    given = {"source": "x", "output": "y", "format": "transmla", "pad_for": "vllm"}
    plan = make_plan(describe(config), parse_recipe(given | changes, "test"), "bfloat16")
    shape = plan.shape
    assert (shape.kv_lora_rank, shape.qk_rope_head_dim) == widths
    assert shape.latent_rank == shape.kv_lora_rank
    assert (shape.qk_nope_head_dim, shape.v_head_dim) == (128, 128)
    vllm = next(runtime for runtime in format_named("transmla").runtimes(plan) if runtime.name == "vLLM")
    assert vllm.accepts
    assert ("padded" in vllm.note) == (widths[1] != 64)


def test_a_row_of_vllm_that_saves_nothing_is_refused() -> None:
    recipe = parse_recipe({"source": "x", "output": "y", "pad_for": "vllm", "format": "transmla"}, "test")
    with pytest.raises(TransmlaError, match="caches 320 values"):
        make_plan(describe(QWEN_0_5B), recipe, "bfloat16")


@pytest.mark.parametrize("widths", [{}, {"cache_ratio": 0.834}, {"qk_rope_head_dim": 16}, {"kv_lora_rank": 60}])
def test_a_source_that_vllms_rotary_width_does_not_fit_is_told_so_at_once(widths: dict[str, Any]) -> None:
    config = LlamaConfig(hidden_size=576, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3)
    recipe = parse_recipe({"source": "x", "output": "y", "pad_for": "vllm", **widths}, "test")
    with pytest.raises(
        TransmlaError, match=r"no fast vLLM kernel takes a rotary key of this source.*; drop --pad-for$"
    ):
        make_plan(describe(config), recipe, "bfloat16")


@pytest.mark.parametrize(
    ("config", "rank", "settings", "padded"),
    [
        (SMOLLM2, 400, {}, False),  # 512 + 64 values, and the source caches 384
        (SMOLLM2, 400, {"allow_no_saving": True}, True),
        (SMOLLM2, 600, {"allow_no_saving": True}, False),  # no kernel takes more than 512
        (LLAMA_8B, 2049, {"allow_no_saving": True}, False),
    ],
)
def test_padding_a_large_rank_is_advised_where_it_is_possible(
    config: Any, rank: int, settings: dict[str, Any], padded: bool
) -> None:
    values = {"source": "x", "output": "y", "kv_lora_rank": rank, **settings}
    with pytest.raises(TransmlaError, match="lower --kv-lora-rank") as refusal:
        make_plan(describe(config), parse_recipe(values, "test"), "bfloat16")
    assert ("--pad-for vllm" in str(refusal.value)) == padded
    if padded:
        make_plan(describe(config), parse_recipe(values | {"pad_for": "vllm"}, "test"), "bfloat16")


def test_plan_names_what_vllm_does_not_serve() -> None:
    recipe = parse_recipe({"source": "x", "output": "y", "cache_ratio": 0.5, "format": "transmla"}, "test")
    plan = make_plan(describe(LLAMA_8B), recipe, "bfloat16")
    vllm = next(runtime for runtime in format_named("transmla").runtimes(plan) if runtime.name == "vLLM")
    assert not vllm.accepts
    assert "latent is 960 wide" in vllm.note


@pytest.mark.parametrize(
    ("widths", "notes"),
    [
        ({"kv_lora_rank": 7, "qk_rope_head_dim": 64}, {"kv_lora_rank 7 ": "; 8 would be read"}),
        ({"kv_lora_rank": 500, "qk_rope_head_dim": 64}, {"kv_lora_rank 500 ": "; 496 and 504 would be read"}),
        (
            {"kv_lora_rank": 100, "qk_rope_head_dim": 4},
            {"kv_lora_rank 100 ": "; 96 and 104 would be read", "qk_rope_head_dim 4 ": "; 8 would be read"},
        ),
        ({"kv_lora_rank": 504, "qk_rope_head_dim": 64}, {}),
        ({"cache_ratio": 0.3}, {}),
        ({"kv_lora_rank": 500, "qk_rope_head_dim": 64, "pad_for": "vllm"}, {}),
    ],
)
def test_a_note_names_widths_that_the_hopper_kernel_reads(widths: dict[str, Any], notes: dict[str, str]) -> None:
    recipe = parse_recipe({"source": "x", "output": "y", **widths}, "test")
    found = [note for note in make_plan(describe(LLAMA_8B), recipe, "bfloat16").notes if "Hopper" in note]
    assert len(found) == len(notes)
    for note, (begins, ends) in zip(found, notes.items(), strict=True):
        assert note.startswith(begins)
        assert note.endswith(ends)


@pytest.mark.parametrize("widths", [(KERNEL_MULTIPLE, KERNEL_MULTIPLE), (512, 64)])
def test_the_multiple_is_that_of_the_hopper_kernel(widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "gluon", hopper)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: hopper.CAPABILITY)
    refusal = lambda *ranks: hopper.refuses(DecodeShape(8, *ranks, torch.bfloat16, torch.device("cuda")))  # noqa: E731
    rank, rotary = widths
    assert refusal(rank, rotary) is None
    assert refusal(rank - 1, rotary) is not None
    assert refusal(rank, rotary - 1) is not None
