"""FP8 and compressed-tensors: read as what they stand for, or refused by name before anything expensive."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.packed_sources import SCHEMES, pack_source
from safetensors.torch import load_file, save_file

from transmla.convert.pipeline import convert
from transmla.convert.prepare import prepare, summarise
from transmla.errors import TransmlaError
from transmla.evaluate.verify import verify
from transmla.export.travel import KEY
from transmla.families.base import PACKED
from transmla.recipe import Recipe
from transmla.source import packed_weights
from transmla.source.checkpoint import open_checkpoint
from transmla.source.load import load_model
from transmla.source.open_source import open_path

Make = Callable[..., tuple[Path, Path]]


@pytest.fixture
def make(make_source: Callable[..., Path], tmp_path: Path) -> Make:
    """``make(scheme, family)`` → the folders of a packed source, and of the same source with plain weights."""

    def call(scheme: str, family: str = "llama") -> tuple[Path, Path]:
        source = make_source(family, num_hidden_layers=2, name=f"{family}-{scheme}", dtype=torch.bfloat16)
        folders = tmp_path / f"{source.name}-packed", tmp_path / f"{source.name}-plain"
        pack_source(source, *folders, scheme)
        return folders

    return call


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_weight_is_what_its_values_and_scales_stand_for(
    scheme: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_weights, "_BLOCK", 3000)
    packed, plain = (open_checkpoint(folder) for folder in make(scheme))
    assert {**packed.shapes} == {**plain.shapes}
    assert packed.dtypes == plain.dtypes
    assert packed.size == plain.size
    for name in plain.shapes:
        assert torch.equal(packed.read(name), plain.read(name)), name


def test_fp8_is_read_as_transformers_dequantises_it(make: Make) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder, _ = make("fp8-whole-blocks", "qwen3_moe")
    settings = FineGrainedFP8Config(weight_block_size=(4, 8), dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=settings)
    ours = load_model(folder, dtype=torch.bfloat16).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(("scheme", "family"), [("fp8", "qwen3_moe"), ("int4-group", "llama")])
def test_a_conversion_of_packed_weights_is_that_of_plain_ones(
    scheme: str, family: str, make: Make, make_recipe: Callable[..., Recipe], assets: Path
) -> None:
    """Also the samples, for which the whole model is loaded."""
    packed, plain = make(scheme, family)
    calibration = {"source": "self", "sequences": 4, "length": 32}
    settings = {"format": "transmla", "calibration": calibration}
    exports = [convert(make_recipe(folder, output=f"{folder.name}-out", **settings)) for folder in (packed, plain)]
    for file in exports[1].glob("*.safetensors"):
        assert (exports[0] / file.name).read_bytes() == file.read_bytes(), file.name
    ours, expected = (json.loads((export / "config.json").read_text()) for export in exports)
    for config in (ours, expected):
        del config[KEY], config["_name_or_path"]  # these name the source
    assert ours == expected
    assert all(check.passed for check in verify(exports[0]))


def test_a_packed_source_is_planned_by_its_headers(make: Make, make_recipe: Callable[..., Recipe]) -> None:
    plans = [summarise(prepare(make_recipe(folder), weights=False)) for folder in make("fp8")]
    assert plans[0]["parameters"] == plans[1]["parameters"]
    assert plans[0]["dtype"] == "bfloat16"


GROUP = {"targets": ["Linear"]}
CT: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True}


def grouped(**weights: Any) -> dict[str, Any]:
    return CT | {"config_groups": {"group_0": GROUP | {"weights": WEIGHTS | weights}}}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq weights are not supported"),
        ({"quant_method": "awq", "bits": 4}, "awq weights are not supported"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes weights are not supported"),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "with scales that are powers of two, are not supported"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "FP8 weights with experts in FP4"),
        (CT | {"format": "nvfp4-pack-quantized"}, "compressed-tensors weights of the format nvfp4-pack-quantized"),
        (grouped(symmetric=False), "compressed-tensors weights with zero points"),
        (grouped(num_bits=3), "compressed-tensors weights of 3 bits"),
        (
            grouped() | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "compressed-tensors weights that are sparse",
        ),
        (grouped() | {"transform_config": {"config_groups": {"a": {}}}}, "that are transformed"),
        (CT | {"config_groups": {"group_0": GROUP}}, "compressed-tensors weights without a description"),
        (CT | {"config_groups": ["group_0"]}, "cannot read the quantization_config of config.json"),
        (CT | {"format": ["pack-quantized"]}, "cannot read the quantization_config of config.json"),
        (grouped() | {"sparsity_config": ["dense"]}, "cannot read the quantization_config of config.json"),
        (
            CT | {"config_groups": {f"group_{bits}": {"weights": WEIGHTS | {"num_bits": bits}} for bits in (4, 8)}},
            "compressed-tensors weights of several widths",
        ),
    ],
)
def test_other_weights_are_refused_by_name_and_before_they_are_looked_at(
    settings: dict[str, Any], says: str, make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    source = make_source()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (source / "model.safetensors").unlink()
    with pytest.raises(TransmlaError, match=says) as refused:
        prepare(make_recipe(source))
    assert "quantise its export" in str(refused.value) or "use the config.json that belongs to" in str(refused.value)
    if settings["quant_method"] in PACKED:
        with pytest.raises(TransmlaError, match=says):
            load_model(source, dtype=torch.float32)


def test_packed_weights_of_a_model_with_soft_caps_load_with_the_attention_that_has_them(make: Make) -> None:
    packed, _ = make("fp8", "gemma2")
    model = load_model(packed, dtype=torch.float32)  # transformers 5.17 would choose another
    assert model.config._attn_implementation == "eager"


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("scheme", "change", "says"),
    [
        ("fp8", lambda t: t.pop(f"{NAME}_scale_inv"), "its F8_E4M3 values need scales"),
        (
            "fp8",
            lambda t: t.update({f"{NAME}_scale_inv": torch.ones(3, 3)}),
            r"scales of the shape \[3, 3\] fit no block",
        ),
        (
            "fp8",
            lambda t: t.update({f"{NAME}_scale_inv": torch.ones(5, dtype=torch.float8_e8m0fnu)}),
            "its F8_E4M3 values need scales",
        ),
        ("int4-group", lambda t: t.update({f"{NAME}_g_idx": torch.zeros(72)}), "weights with 'weight_g_idx'"),
        ("int4-group", lambda t: t.update({f"{NAME}_zero_point": torch.zeros(72)}), "weights with 'weight_zero_point'"),
    ],
)
def test_packed_weights_that_cannot_be_read_are_refused_by_their_header(
    scheme: str, change: Callable[[dict[str, torch.Tensor]], object], says: str, make: Make
) -> None:
    folder, _ = make(scheme)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TransmlaError, match=rf"the packed weight '{NAME}.*' cannot be read; .*{says}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("size", [["a", "b"], [16.5, 32], [0, 32], "16x32", [16]])
def test_blocks_of_impossible_sizes_are_refused(size: Any, make: Make) -> None:
    folder, _ = make("fp8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = size
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TransmlaError, match=r"fit no block that config\.json names"):
        open_checkpoint(folder)


def test_scales_of_a_plain_weight_are_not_in_the_model(make: Make) -> None:
    """Nothing is dropped silently."""
    folder, _ = make("fp8")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TransmlaError, match=r"tensor 'lm_head.weight_scale_inv' is not in the model"):
        open_path(folder)
