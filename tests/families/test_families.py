"""Conversions of every family: uncut exports equal their source, and others follow their plan."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interrupted import Killed, KilledAtLayer, files
from helpers.tiny_sources import build_tokenizer
from helpers.uncut_exports import COMMON, FAMILIES, make_source
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import transmla
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.evaluate.verify import verify
from transmla.families.base import Family, rope_tables
from transmla.plan import family_table as support
from transmla.plan.fit_settings import FITS
from transmla.plan.make_plan import make_plan
from transmla.recipe import Recipe, parse_recipe
from transmla.registry import scan
from transmla.source.describe import describe, family_of

REGISTRY: dict[str, Family] = scan("transmla.families", "FAMILY")


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """Return a function that makes recipes for ``tmp_path/source``, with random calibration text."""
    words = torch.randint(3, 64, (8000,), generator=torch.Generator().manual_seed(2)).tolist()
    (tmp_path / "text.txt").write_text("".join(chr(33 + word) for word in words))

    def make(**settings: Any) -> Recipe:
        calibration = {"source": str(tmp_path / "text.txt"), "sequences": 16, "length": 32}
        defaults = {"source": str(tmp_path / "source"), "output": str(tmp_path / "out"), "calibration": calibration}
        return parse_recipe(defaults | {"device": "cpu", "reconstruct": "off"} | settings, "test")

    return make


def source_of(family: str, folder: Path, **changes: Any) -> Any:
    """Save a random model of the family and a tokenizer to ``folder/source``; return the model."""
    model = make_source(family, folder / "source", vocab_size=128, **changes)
    build_tokenizer(folder / "source", 128)
    return model


def uncut(model: Any) -> dict[str, Any]:
    """Return settings with a rotary slot for every rotated pair of every key head, and a latent for everything else."""
    spec = describe(model.config)
    rotated = max(kind.rotary_pairs for kind in spec.kinds or (spec.kind(0),))
    groups, unrotated = spec.num_key_value_heads, spec.head_dim - 2 * rotated
    rank = min(groups * (spec.head_dim + unrotated) + 1, spec.features, 2 * groups * spec.head_dim)
    return {"kv_lora_rank": rank, "qk_rope_head_dim": 2 * rotated * groups, "allow_no_saving": True}


@pytest.mark.parametrize("family", REGISTRY)
@torch.no_grad()
def test_uncut_export_equals_the_source(family: str, tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    model = source_of(family, tmp_path)
    out = convert(make_recipe(format="transmla", **uncut(model)))
    transmla.register()
    export = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    ids = torch.randint(3, 128, (2, 30), generator=torch.Generator().manual_seed(1))
    expected, logits = model(ids).logits, export(ids).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", REGISTRY)
def test_export_follows_its_plan(family: str, tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    source_of(family, tmp_path)
    out = convert(make_recipe(format="transmla", cache_ratio=0.5))
    checks = list(verify(out, source=str(tmp_path / "source")))
    assert {"cached decode = full forward", "cache size", "absorbed = expanded", "untouched weights"} <= {
        check.name for check in checks
    }
    assert [check for check in checks if not check.passed] == []
    manifest = json.loads((out / "transmla.json").read_text())
    # SmolLM3's second layer has no RoPE: a full latent, and one rotary pair of frequency 0.
    assert 2 * 40 <= manifest["plan"]["model_cache_values"] <= 2 * 48 + (2 if family == "smollm3" else 0)
    assert "trust_remote_code=True" in (out / "README.md").read_text()


@pytest.mark.parametrize("family", REGISTRY)
@torch.no_grad()
def test_uncut_export_equals_the_source_with_a_latent_narrower_than_the_hidden_states(
    family: str, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    """The hidden size exceeds the width of all keys and values, so the comparison uses calibration tokens."""
    model = source_of(family, tmp_path, hidden_size=144)
    recipe = make_recipe(format="transmla", **uncut(model))
    assert recipe.kv_lora_rank < min(model.config.hidden_size, 2 * 3 * COMMON["head_dim"] + 1)
    out = convert(recipe)
    transmla.register()
    export = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    text = (tmp_path / "text.txt").read_text()[:60]
    ids = AutoTokenizer.from_pretrained(out)(text, return_tensors="pt")["input_ids"].view(2, 30)
    expected, logits = model(ids).logits, export(ids).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def rope(rope_type: str, pairs: int, original: int = 20) -> dict[str, Any]:
    """Return settings of ``rope_type`` for heads with ``pairs`` rotated pairs; ``original`` is the original length."""
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    factors = {
        "short_factor": torch.linspace(1, 1.5, pairs).tolist(),
        "long_factor": torch.linspace(1, 8, pairs).tolist(),
    }
    specific = {"llama3": llama3, "longrope": factors}.get(rope_type, {})
    length = {} if rope_type == "linear" else {"original_max_position_embeddings": original}
    return {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0} | length | specific


SCALED = [(entry.family, kind) for entry in support.supported() for kind in entry.rope_types if kind != "default"]


@pytest.mark.parametrize(("family", "rope_type"), SCALED)
@torch.no_grad()
def test_scaled_frequencies_equal_the_sources(
    family: str, rope_type: str, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    """Includes partly rotated heads, and texts longer than longrope's short length."""
    # Phi-3 derives the number of factors from the hidden size, and names the short length in its config.
    more = {"num_attention_heads": 3, "original_max_position_embeddings": 20} if family == "phi3" else {}
    config = copy.deepcopy(AutoConfig.for_model(family, **(FAMILIES[family] | COMMON | more)))
    for table in rope_tables(config):
        pairs = round(COMMON["head_dim"] * table.get("partial_rotary_factor", 1.0)) // 2
        kept = {name: table[name] for name in ("rope_theta", "partial_rotary_factor") if name in table}
        table.clear()
        table.update(rope(rope_type, pairs) | kept)
    settings = {"rope_parameters": config.rope_parameters, "max_position_embeddings": 256, **more}
    model = source_of(family, tmp_path, **settings)
    calibration = {"source": str(tmp_path / "text.txt"), "sequences": 24, "length": 20}
    out = convert(make_recipe(format="transmla", calibration=calibration, **uncut(model)))
    transmla.register()
    export = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert export.model.layers[0].self_attn.frequencies.bits.any()
    for length in (16, 30):
        ids = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(1))
        expected, logits = model(ids).logits, export(ids).logits
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max(), length
    if family == "phi3":
        # Phi-3's generate() recomputes the cache when the text exceeds the short length.
        ids, options = torch.arange(3, 19)[None], {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
        assert torch.equal(export.generate(ids, **options), model.generate(ids, **options))
    if rope_type == "longrope":
        with pytest.raises(TransmlaError, match="calibration sequences of 24 tokens are longer than 20"):
            convert(make_recipe(output=str(tmp_path / "far"), calibration=calibration | {"length": 24}))


WITHOUT_TRANSMLA = """
import sys
sys.modules["transmla"] = None
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    tokens = model.generate(torch.arange(3, 12)[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
    print(*tokens[0].tolist())
"""


def test_export_loads_and_generates_without_transmla(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    folders, expected = [], []
    for family in ("qwen2", "qwen3", "gemma3_text", "mixtral", "gpt_oss", "smollm3"):
        source_of(family, tmp_path / family)
        paths = {"source": str(tmp_path / family / "source"), "output": str(tmp_path / family / "out")}
        folders.append(str(convert(make_recipe(cache_ratio=0.5, **paths))))
        tokens = transmla.load(folders[-1]).generate(
            torch.arange(3, 12)[None], max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        expected.append(" ".join(map(str, tokens[0].tolist())))
    command = [sys.executable, "-c", WITHOUT_TRANSMLA, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text", "olmo2", "gpt_oss", "mixtral"])
def test_a_fit_reduces_the_held_out_error(
    family: str, tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FITS, "fast", replace(FITS["fast"], steps=60))
    source_of(family, tmp_path)
    calibration = {"source": str(tmp_path / "text.txt"), "sequences": 62, "length": 64}
    out = convert(make_recipe(cache_ratio=0.3, reconstruct="fast", calibration=calibration))
    layers = json.loads((out / "transmla.json").read_text())["layers"]
    assert all(layer["held_out_after"] <= layer["held_out_before"] for layer in layers)
    assert layers[0]["held_out_after"] < 0.97 * layers[0]["held_out_before"]
    # The export equals the fitted factors only if the fit left out the features that a head may not read.
    assert all(check.passed for check in verify(out, source=str(tmp_path / "source")))


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_a_killed_conversion_resumes_to_the_same_bytes(
    family: str, tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transmla.convert.shard_writer.SAVE_SECONDS", 0)
    source_of(family, tmp_path)
    recipe = make_recipe(cache_ratio=0.5, output=str(tmp_path / "a" / "out"))
    whole = files(convert(recipe))
    (tmp_path / "a" / "out").rename(tmp_path / "whole")
    with pytest.raises(Killed):
        convert(recipe, reporter=KilledAtLayer(1))
    assert files(convert(recipe, resume=True)) == whole


@pytest.mark.parametrize(("family", "reconstruct"), [("llama", "fast"), ("qwen3_moe", "off"), ("gpt_oss", "fast")])
def test_some_layers_keep_the_sources_attention(
    family: str, reconstruct: str, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    model = source_of(family, tmp_path)
    out = convert(make_recipe(cache_ratio=0.5, layers="1", reconstruct=reconstruct))
    transmla.register()
    export = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert [hasattr(layer.self_attn, "kv_b_proj") for layer in export.model.layers] == [False, True]
    assert all(check.passed for check in verify(out, source=str(tmp_path / "source")))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, hidden = (m(ids, output_hidden_states=True).hidden_states[1] for m in (model, export))
    assert torch.allclose(hidden, expected, atol=1e-5)


def test_experts_are_copied_unchanged(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    source_of("mixtral", tmp_path)
    out = convert(make_recipe(cache_ratio=0.5))
    with safe_open(tmp_path / "source" / "model.safetensors", "pt") as source:
        experts = [name for name in source.keys() if ".experts." in name]  # noqa: SIM118
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(experts) == 2 * 4 * 3
        for name in experts:
            with safe_open(out / index[name], "pt") as export:
                assert export.get_tensor(name).equal(source.get_tensor(name))


def test_a_missing_expert_is_reported_before_anything_is_written(
    tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    source_of("mixtral", tmp_path)
    file, name = tmp_path / "source" / "model.safetensors", "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(TransmlaError, match=f"1 tensors are missing, the first is '{name}'"):
        convert(make_recipe(cache_ratio=0.5))
    assert not list(tmp_path.glob("out*"))


def test_a_converted_model_is_refused_as_source(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    source_of("qwen2", tmp_path)
    out = convert(make_recipe(cache_ratio=0.5))
    with pytest.raises(TransmlaError, match="is already converted"):
        convert(make_recipe(source=str(out), output=str(tmp_path / "again")))


@pytest.mark.parametrize("family", REGISTRY)
def test_a_source_in_half_precision_converts(
    family: str, tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the source in bfloat16, as on GPUs, with a padding token that no text contains."""
    monkeypatch.setattr("transmla.source.open_source.is_fast_in_bfloat16", lambda device: True)
    model = make_source(family, tmp_path / "half", vocab_size=128, pad_token_id=127)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    build_tokenizer(tmp_path / "source", 128)
    out = convert(make_recipe(format="transmla", cache_ratio=0.5))
    failed = [check for check in verify(out, source=str(tmp_path / "source")) if not check.passed]
    assert failed == []


def test_native_is_chosen_if_it_can_express_the_source() -> None:
    def plan(family: str, **settings: Any) -> Any:
        tiny = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **REGISTRY[family].tiny}
        changes = settings.pop("config", {})
        recipe = parse_recipe({"source": "s", "output": "o", "allow_no_saving": True, **settings}, "test")
        return make_plan(describe(AutoConfig.for_model(family, **(tiny | changes))), recipe, "float32")

    assert plan("llama").format == plan("mistral", config={"sliding_window": None}).format == "native"
    for family in REGISTRY:
        assert plan(family, format="transmla").format == "transmla"
        if family not in ("llama", "mistral"):
            chosen = plan(family)
            assert chosen.format == "transmla"
            assert chosen.notes[0].startswith("format transmla: the native format cannot store ")
    assert "attention_bias" in plan("llama", config={"attention_bias": True}).notes[0]
    assert plan("llama", layers="1").kept == (0,)
    assert plan("llama", layers="0-1").format == "native"
    refusals = [
        (
            {"format": "native", "config": {"attention_bias": True}},
            "llama: the native format cannot store attention_bias",
        ),
        (
            {"format": "native", "layers": "0"},
            "cannot store layers that keep the source's attention; leave --format out, or convert all layers",
        ),
        (
            {"format": "native", "layers": "0", "config": {"attention_bias": True}},
            "cannot store attention_bias; leave --format out$",
        ),
        ({"format": "transmla", "q_lora_rank": 8}, "--q-lora-rank needs the native format"),
        ({"format": "transmla", "custom_rope": True}, "--custom-rope needs the native format"),
        (
            {"layers": "1-2"},
            "--layers 1-2: '1-2' names no layers; the model has layers 0 to 1; write for example --layers 1, or 0-1$",
        ),
        ({"layers": "some"}, "'some' names no layers"),
        ({"layers": "0-"}, "'0-' names no layers"),
        ({"format": "transmla", "qk_rope_head_dim": 10, "kv_lora_rank": 8}, "qk_rope_head_dim 10 does not fit"),
    ]
    for settings, message in refusals:
        with pytest.raises(TransmlaError, match=message.replace("(", r"\(")):
            plan("llama", **settings)

    with pytest.raises(TransmlaError, match="the source caches 96, so nothing is saved"):
        plan("qwen3", cache_ratio=1.0, allow_no_saving=False)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic' is not"),
        ("qwen2_moe", {"quantization_config": {"quant_method": "awq"}}, "awq weights are not supported"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "gptq weights are not supported"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes weights are not supported"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4 weights are not supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "does not support: non-causal attention"),
        ("mixtral", {"num_key_value_heads": 4}, "6 query heads cannot share 4 key heads equally"),
    ],
)
def test_unsupported_features_are_refused_by_name(family: str, changes: dict[str, Any], message: str) -> None:
    tiny = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **REGISTRY[family].tiny}
    with pytest.raises(TransmlaError, match=message):
        describe(AutoConfig.for_model(family, **(tiny | changes)))


@pytest.mark.parametrize("wrapper", ["gemma3", "qwen2_vl", "llava", "mistral3"])
def test_multimodal_models_are_refused(wrapper: str) -> None:
    with pytest.raises(TransmlaError, match=r"is a multimodal model; .*its language model, of model_type '"):
        family_of(AutoConfig.for_model(wrapper))


def test_the_documentation_has_the_current_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert support.markdown() in page
    assert support.notes() in " ".join(page.split())


def test_the_tests_of_the_transmla_format_cover_every_family() -> None:
    assert set(FAMILIES) == set(REGISTRY)
