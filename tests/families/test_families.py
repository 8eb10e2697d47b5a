"""Every family of the registry, converted: nothing cut it is its source, cut it is what its plan says."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
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
from transmla.plan.make_plan import make_plan
from transmla.recipe import Recipe, parse_recipe
from transmla.registry import scan
from transmla.source.describe import describe, family_of

FOUND: dict[str, Family] = scan("transmla.families", "FAMILY")


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe for ``tmp_path/source``, on random text that leaves no direction unseen."""
    words = torch.randint(3, 64, (8000,), generator=torch.Generator().manual_seed(2)).tolist()
    (tmp_path / "text.txt").write_text("".join(chr(33 + word) for word in words))

    def make(**settings: Any) -> Recipe:
        calibration = {"source": str(tmp_path / "text.txt"), "sequences": 16, "length": 32}
        named = {"source": str(tmp_path / "source"), "output": str(tmp_path / "out"), "calibration": calibration}
        return parse_recipe(named | {"device": "cpu", "reconstruct": "off"} | settings, "test")

    return make


def source_of(family: str, folder: Path, **changes: Any) -> Any:
    model = make_source(family, folder / "source", vocab_size=128, **changes)
    build_tokenizer(folder / "source", 128)
    return model


def uncut(model: Any) -> dict[str, Any]:
    """Settings with a rotary slot for every turned channel of every head, and a latent for all the rest."""
    spec = describe(model.config)
    turned = max(kind.turned for kind in spec.kinds or (spec.kind(0),))
    groups, still = spec.num_key_value_heads, spec.head_dim - 2 * turned
    rank = min(groups * (spec.head_dim + still) + 1, spec.features, 2 * groups * spec.head_dim)
    return {"kv_lora_rank": rank, "qk_rope_head_dim": 2 * turned * groups, "allow_no_saving": True}


@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_nothing_cut_is_the_source(family: str, tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    model = source_of(family, tmp_path)
    out = convert(make_recipe(format="transmla", **uncut(model)))
    transmla.register()
    export = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    ids = torch.randint(3, 128, (2, 30), generator=torch.Generator().manual_seed(1))
    theirs, ours = model(ids).logits, export(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("family", FOUND)
def test_cut_it_is_what_its_plan_says(family: str, tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    source_of(family, tmp_path)
    out = convert(make_recipe(format="transmla", cache_ratio=0.5))
    checks = list(verify(out, source=str(tmp_path / "source")))
    assert {"cached decode = full forward", "cache size", "absorbed = expanded", "untouched weights"} <= {
        check.name for check in checks
    }
    assert [check for check in checks if not check.passed] == []
    manifest = json.loads((out / "transmla.json").read_text())
    # SmolLM3's second layer turns nothing, and has a pair of rotary channels that stand still beside a whole latent.
    assert 2 * 40 <= manifest["plan"]["model_cache_values"] <= 2 * 48 + (2 if family == "smollm3" else 0)
    assert "trust_remote_code=True" in (out / "README.md").read_text()


@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_nothing_cut_is_the_source_where_the_latent_is_not_all_of_the_hidden_state(
    family: str, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    """Wider than all keys and values that do not turn; judged on tokens that the calibration text holds."""
    model = source_of(family, tmp_path, hidden_size=144)
    recipe = make_recipe(format="transmla", **uncut(model))
    assert recipe.kv_lora_rank < min(model.config.hidden_size, 2 * 3 * COMMON["head_dim"] + 1)
    out = convert(recipe)
    transmla.register()
    export = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    text = (tmp_path / "text.txt").read_text()[:60]
    ids = AutoTokenizer.from_pretrained(out)(text, return_tensors="pt")["input_ids"].view(2, 30)
    theirs, ours = model(ids).logits, export(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def rope(rope_type: str, pairs: int, original: int = 20) -> dict[str, Any]:
    """Rotary settings of a type, for heads of which ``pairs`` pairs turn; short texts have ``original`` tokens."""
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    factors = {
        "short_factor": torch.linspace(1, 1.5, pairs).tolist(),
        "long_factor": torch.linspace(1, 8, pairs).tolist(),
    }
    more = {"llama3": llama3, "longrope": factors}.get(rope_type, {})
    known = {} if rope_type == "linear" else {"original_max_position_embeddings": original}
    return {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0} | known | more


SCALED = [(found.family, kind) for found in support.supported() for kind in found.rope_types if kind != "default"]


@pytest.mark.parametrize(("family", "rope_type"), SCALED)
@torch.no_grad()
def test_scaled_frequencies_are_the_sources(
    family: str, rope_type: str, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    """Also where only a part of every head turns, and on texts longer than those that longrope calls short."""
    # Phi-3 checks its factors by the hidden size, and has its own word for short.
    more = {"num_attention_heads": 3, "original_max_position_embeddings": 20} if family == "phi3" else {}
    given = copy.deepcopy(AutoConfig.for_model(family, **(FAMILIES[family] | COMMON | more)))
    for table in rope_tables(given):
        pairs = round(COMMON["head_dim"] * table.get("partial_rotary_factor", 1.0)) // 2
        kept = {name: table[name] for name in ("rope_theta", "partial_rotary_factor") if name in table}
        table.clear()
        table.update(rope(rope_type, pairs) | kept)
    settings = {"rope_parameters": given.rope_parameters, "max_position_embeddings": 256, **more}
    model = source_of(family, tmp_path, **settings)
    calibration = {"source": str(tmp_path / "text.txt"), "sequences": 24, "length": 20}
    out = convert(make_recipe(format="transmla", calibration=calibration, **uncut(model)))
    transmla.register()
    export = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert export.model.layers[0].self_attn.frequencies.bits.any()
    for length in (16, 30):
        ids = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(1))
        theirs, ours = model(ids).logits, export(ids).logits
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max(), length
    if family == "phi3":
        # Its own generate() reads the text again where it becomes long.
        ids, asked = torch.arange(3, 19)[None], {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
        assert torch.equal(export.generate(ids, **asked), model.generate(ids, **asked))
    if rope_type == "longrope":
        with pytest.raises(TransmlaError, match="calibration sequences of 24 tokens are longer than 20"):
            convert(make_recipe(output=str(tmp_path / "far"), calibration=calibration | {"length": 24}))


STRANGER = """
import sys
sys.modules["transmla"] = None
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, told = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, told)
    tokens = model.generate(torch.arange(3, 12)[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
    print(*tokens[0].tolist())
"""


def test_it_loads_and_generates_where_transmla_is_not(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    folders, wanted = [], []
    for family in ("qwen2", "qwen3", "gemma3_text", "mixtral", "gpt_oss", "smollm3"):
        source_of(family, tmp_path / family)
        given = {"source": str(tmp_path / family / "source"), "output": str(tmp_path / family / "out")}
        folders.append(str(convert(make_recipe(cache_ratio=0.5, **given))))
        tokens = transmla.load(folders[-1]).generate(
            torch.arange(3, 12)[None], max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        wanted.append(" ".join(map(str, tokens[0].tolist())))
    command = [sys.executable, "-c", STRANGER, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == wanted


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text", "olmo2", "gpt_oss", "mixtral"])
def test_a_fit_is_better_on_text_that_it_has_not_seen(
    family: str, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    source_of(family, tmp_path)
    calibration = {"source": str(tmp_path / "text.txt"), "sequences": 62, "length": 64}
    out = convert(make_recipe(cache_ratio=0.3, reconstruct="fast", calibration=calibration))
    layers = json.loads((out / "transmla.json").read_text())["layers"]
    assert all(layer["held_out_after"] <= layer["held_out_before"] for layer in layers)
    assert layers[0]["held_out_after"] < 0.97 * layers[0]["held_out_before"]
    # What was fitted is what is written: features that a head may not read took no part.
    assert all(check.passed for check in verify(out, source=str(tmp_path / "source")))


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_a_killed_conversion_resumes_to_the_same_bytes(
    family: str, tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transmla.convert.pipeline.SAVE_SECONDS", 0)
    source_of(family, tmp_path)
    recipe = make_recipe(cache_ratio=0.5, output=str(tmp_path / "a" / "out"))
    whole = files(convert(recipe))
    (tmp_path / "a" / "out").rename(tmp_path / "whole")
    with pytest.raises(Killed):
        convert(recipe, reporter=KilledAtLayer(1))
    assert files(convert(recipe, resume=True)) == whole


@pytest.mark.parametrize(("family", "reconstruct"), [("llama", "fast"), ("qwen3_moe", "off"), ("gpt_oss", "fast")])
def test_layers_may_keep_the_sources_attention(
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
        wanted, found = (m(ids, output_hidden_states=True).hidden_states[1] for m in (model, export))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_experts_are_copied_as_they_are(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    source_of("mixtral", tmp_path)
    out = convert(make_recipe(cache_ratio=0.5))
    with safe_open(tmp_path / "source" / "model.safetensors", "pt") as source:
        experts = [name for name in source.keys() if ".experts." in name]  # noqa: SIM118
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(experts) == 2 * 4 * 3
        for name in experts:
            with safe_open(out / index[name], "pt") as export:
                assert export.get_tensor(name).equal(source.get_tensor(name))


def test_an_expert_that_is_missing_is_named_before_anything_is_written(
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


def test_a_converted_model_is_no_source(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    source_of("qwen2", tmp_path)
    out = convert(make_recipe(cache_ratio=0.5))
    with pytest.raises(TransmlaError, match="is converted already"):
        convert(make_recipe(source=str(out), output=str(tmp_path / "again")))


@pytest.mark.parametrize("family", FOUND)
def test_a_source_run_in_half_precision_converts(
    family: str, tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs; with a padding token that no text holds."""
    monkeypatch.setattr("transmla.source.is_fast_in_bfloat16", lambda device: True)
    model = make_source(family, tmp_path / "half", vocab_size=128, pad_token_id=127)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    build_tokenizer(tmp_path / "source", 128)
    out = convert(make_recipe(format="transmla", cache_ratio=0.5))
    found = [check for check in verify(out, source=str(tmp_path / "source")) if not check.passed]
    assert found == []


def test_native_is_chosen_where_it_can_say_everything() -> None:
    def plan(family: str, **settings: Any) -> Any:
        tiny = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **FOUND[family].tiny}
        changes = settings.pop("config", {})
        recipe = parse_recipe({"source": "s", "output": "o", "allow_no_saving": True, **settings}, "test")
        return make_plan(describe(AutoConfig.for_model(family, **(tiny | changes))), recipe, "float32")

    assert plan("llama").format == plan("mistral", config={"sliding_window": None}).format == "native"
    for family in FOUND:
        assert plan(family, format="transmla").format == "transmla"
        if family not in ("llama", "mistral"):
            found = plan(family)
            assert found.format == "transmla"
            assert found.notes[0].startswith("format transmla: DeepSeek-V3's has no place for ")
    assert "attention_bias" in plan("llama", config={"attention_bias": True}).notes[0]
    assert plan("llama", layers="1").kept == (0,)
    assert plan("llama", layers="0-1").format == "native"
    refusals = [
        ({"format": "native", "config": {"attention_bias": True}}, "llama: attention_bias cannot be carried"),
        ({"format": "native", "layers": "0"}, "--layers keeps the source's attention in some layers"),
        ({"format": "transmla", "pad_for": "vllm"}, "--pad-for needs the native format"),
        ({"format": "transmla", "q_lora_rank": 8}, "--q-lora-rank needs the native format"),
        ({"format": "transmla", "custom_rope": True}, "--custom-rope needs the native format"),
        ({"layers": "1-2"}, "--layers 1-2: '1-2' names no layers; the model has layers 0 to 1"),
        ({"layers": "some"}, "'some' names no layers"),
        ({"layers": "0-"}, "'0-' names no layers"),
        ({"format": "transmla", "qk_rope_head_dim": 10, "kv_lora_rank": 8}, "qk_rope_head_dim 10 does not fit"),
    ]
    for settings, says in refusals:
        with pytest.raises(TransmlaError, match=says.replace("(", r"\(")):
            plan("llama", **settings)

    with pytest.raises(TransmlaError, match="the source caches 96, so nothing is saved"):
        plan("qwen3", cache_ratio=1.0, allow_no_saving=False)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic' is not"),
        ("qwen2_moe", {"quantization_config": {"quant_method": "fp8"}}, "fp8 weights are not supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "would leave out: attention to the future"),
        ("mixtral", {"num_key_value_heads": 4}, "6 query heads do not divide over 4 key heads"),
    ],
)
def test_what_no_format_carries_is_refused_by_name(family: str, changes: dict[str, Any], says: str) -> None:
    tiny = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **FOUND[family].tiny}
    with pytest.raises(TransmlaError, match=says):
        describe(AutoConfig.for_model(family, **(tiny | changes)))


@pytest.mark.parametrize("wrapper", ["gemma3", "qwen2_vl", "llava", "mistral3"])
def test_models_of_more_than_text_are_refused(wrapper: str) -> None:
    with pytest.raises(TransmlaError, match=r"is a model of text and more; .*its language model, of model_type '"):
        family_of(AutoConfig.for_model(wrapper))


def test_the_readme_holds_the_registrys_table() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert support.markdown() in readme
    assert support.notes() in " ".join(readme.split())


def test_the_tests_of_the_own_format_know_every_family() -> None:
    assert set(FAMILIES) == set(FOUND)
