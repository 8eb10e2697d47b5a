"""A native export is complete without transmla: stock transformers runs it, and all accompanying files are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_sources import build_model, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from transmla.convert.pipeline import convert
from transmla.export.card import public_recipe
from transmla.export.hashes import file_sha256
from transmla.formats.native_layout import INPUT_SCALE
from transmla.plan.make_plan import make_plan
from transmla.recipe import Recipe, dump_recipe, parse_recipe, read_recipe
from transmla.source.checkpoint import Checkpoint, open_checkpoint
from transmla.source.describe import describe, read_config

PROMPTS = ["the cat", "the dog sat on the mat and", "log"]
NEW_TOKENS = 12
CALIBRATION = {"source": "self", "sequences": 8, "length": 48}
# Name → (layout and config of the source, settings of the recipe).
EXPORTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cut": ({"layout": "gqa", "rms_norm_eps": 1e-5}, {}),
    # One key head and nothing cut: the export generates the source's tokens.
    "exact": ({"layout": "mqa"}, {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "allow_no_saving": True}),
    "queries": ({"layout": "mha"}, {"q_lora_rank": 40, "dtype": "bfloat16"}),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds, for every name in EXPORTS, the export ``name`` and its source ``name-source``."""
    folder = tmp_path_factory.mktemp("exports")
    for name, (config, _) in EXPORTS.items():
        source = folder / f"{name}-source"
        model = build_model(**config)
        model.generation_config.temperature = 0.7
        model.generation_config.do_sample = True
        model.save_pretrained(source)
        build_tokenizer(source)
        convert(recipe(folder, name))
    return folder


def recipe(folder: Path, name: str) -> Recipe:
    values = {
        "source": str(folder / f"{name}-source"),
        "output": str(folder / name),
        "calibration": CALIBRATION,
    }
    return parse_recipe(values | EXPORTS[name][1] | {"device": "cpu", "reconstruct": "fast"}, "test")


def opened(folder: Path) -> tuple[dict[str, Any], Checkpoint, dict[str, Any]]:
    """Return config.json, tensors and transmla.json of an export."""
    config, manifest = (json.loads((folder / file).read_text()) for file in ("config.json", "transmla.json"))
    return config, open_checkpoint(folder), manifest


STOCK = """
import importlib.abc, json, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transmla":
            raise ModuleNotFoundError(name)
# An installed transmla has begun to wait for transformers when Python started.
sys.meta_path[:] = [Blocked(), *(f for f in sys.meta_path if type(f).__module__ != "transmla.autoload")]
for name in [name for name in sys.modules if name.split(".")[0] == "transmla"]:
    del sys.modules[name]
try:
    import transmla
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("transmla can be imported")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
prompts, new, folders = json.loads(sys.argv[1])
fixed = dict(do_sample=False, temperature=None, max_new_tokens=new, min_new_tokens=new)
plain = dict(return_tensors="pt", return_token_type_ids=False)
outputs = {}
for folder in folders:
    # In float64 no near-tie between two tokens is decided by the order of a sum, which differs between CPUs.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    alone = {}
    for use_cache in (True, False):
        alone[use_cache] = [
            model.generate(**tokenizer(p, **plain), use_cache=use_cache, **fixed)[0, -new:].tolist()
            for p in prompts
        ]
    batch = tokenizer(prompts, padding=True, **plain)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = [generate(p, return_full_text=False, **fixed)[0]["generated_text"] for p in prompts]
    outputs[folder] = {
        "class": type(model).__module__,
        "cached": alone[True], "uncached": alone[False],
        "batched": model.generate(**batch, **fixed)[:, -new:].tolist(),
        "pipeline": texts, "decoded": [tokenizer.decode(t, skip_special_tokens=True) for t in alone[True]],
        "chat": chat,
    }
print(json.dumps(outputs))
"""


@pytest.fixture(scope="module")
def stock(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a fresh process, which cannot import transmla, generates from every export."""
    folders = [str(exports / name) for name in EXPORTS]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, json.dumps([PROMPTS, NEW_TOKENS, folders])],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {Path(folder).name: outputs for folder, outputs in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("name", EXPORTS)
def test_without_transmla_every_way_to_generate_agrees(stock: dict[str, Any], name: str) -> None:
    outputs = stock[name]
    assert outputs["class"] == "transformers.models.deepseek_v3.modeling_deepseek_v3"
    assert outputs["cached"] == outputs["uncached"] == outputs["batched"]
    assert outputs["pipeline"] == outputs["decoded"]
    assert outputs["chat"] == "the cat\n"


@torch.no_grad()
def test_an_exact_export_generates_the_sources_tokens(stock: dict[str, Any], exports: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(exports / "exact-source")
    tokenizer = AutoTokenizer.from_pretrained(exports / "exact-source")
    for prompt, tokens in zip(PROMPTS, stock["exact"]["cached"], strict=True):
        inputs = torch.tensor([tokenizer(prompt)["input_ids"]])
        fixed = {"do_sample": False, "temperature": None, "min_new_tokens": NEW_TOKENS}
        assert source.generate(inputs, max_new_tokens=NEW_TOKENS, **fixed)[0, inputs.shape[1] :].tolist() == tokens


@pytest.mark.parametrize("name", EXPORTS)
def test_config_is_a_dense_deepseek_v3(exports: Path, name: str) -> None:
    config, tensors, manifest = opened(exports / name)
    source = json.loads((exports / f"{name}-source" / "config.json").read_text())
    shape = manifest["plan"]["shape"]
    fixed = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "first_k_dense_replace": source["num_hidden_layers"],
        "num_nextn_predict_layers": 0,
        "moe_layer_freq": 1,
        "num_key_value_heads": source["num_attention_heads"],
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_interleave": True,
        "rope_parameters": source["rope_parameters"],
        "rms_norm_eps": 1e-6,
    }
    assert {key: config[key] for key in fixed} == fixed
    widths = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    assert {key: config[key] for key in widths} == {key: shape[key] for key in widths}
    kept = (
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
    )
    assert {key: config[key] for key in kept} == {key: source[key] for key in kept}
    # The integers of MoE keep the config class's defaults, and the config names no custom code.
    absent = (
        "n_routed_experts",
        "n_group",
        "topk_group",
        "num_experts_per_tok",
        "n_shared_experts",
        "head_dim",
    )
    assert not {*absent, "auto_map", "quantization_config"} & set(config)
    assert config["dtype"] == manifest["plan"]["dtype"]
    assert tensors.shapes["lm_head.weight"] == (config["vocab_size"], config["hidden_size"])


@pytest.mark.parametrize("name", EXPORTS)
def test_attention_tensors_are_exactly_those_of_deepseek_v3(exports: Path, name: str) -> None:
    config, tensors, _ = opened(exports / name)
    heads, rank, rope = (config[key] for key in ("num_attention_heads", "kv_lora_rank", "qk_rope_head_dim"))
    nope, value, hidden = (config[key] for key in ("qk_nope_head_dim", "v_head_dim", "hidden_size"))
    expected = {
        "kv_a_proj_with_mqa": (rank + rope, hidden),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (heads * (nope + value), rank),
        "o_proj": (hidden, heads * value),
    }
    if (queries := config["q_lora_rank"]) is None:
        expected["q_proj"] = (heads * (nope + rope), hidden)
    else:
        expected |= {
            "q_a_proj": (queries, hidden),
            "q_a_layernorm": (queries,),
            "q_b_proj": (heads * (nope + rope), queries),
        }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn."
        shapes = {n.removeprefix(prefix): s for n, s in tensors.shapes.items() if n.startswith(prefix)}
        assert shapes == {f"{key}.weight": shape for key, shape in expected.items()}


def test_norm_weights_compensate_the_changed_eps(exports: Path) -> None:
    """eps falls from 1e-5 to 1e-6, so each norm's weight is multiplied by one factor below 1."""
    _, tensors, manifest = opened(exports / "cut")
    source = open_checkpoint(exports / "cut-source")
    for name in source.shapes:
        if "norm" in name:
            scale = INPUT_SCALE if "input_layernorm" in name else 1.0
            ratio = tensors.read(name) / source.read(name) / scale
            assert float(ratio.max() - ratio.min()) < 1e-6
            assert 0.9 < float(ratio.mean()) < 1
    assert float(tensors.read("model.norm.weight")[0] / source.read("model.norm.weight")[0]) == pytest.approx(
        manifest["final_norm_correction"]
    )


@pytest.mark.parametrize("name", EXPORTS)
def test_tokenizer_template_and_generation_config_are_the_sources_bytes(exports: Path, name: str) -> None:
    source = exports / f"{name}-source"
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (exports / name / file).read_bytes() == (source / file).read_bytes()
    ours, theirs = (json.loads((path / "tokenizer_config.json").read_text()) for path in (exports / name, source))
    # The class has the name that transformers 4 knows.
    assert (ours.pop("tokenizer_class"), theirs.pop("tokenizer_class")) == (
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
    )
    assert ours == theirs
    assert json.loads((exports / name / "generation_config.json").read_text())["temperature"] == 0.7


@pytest.mark.parametrize("name", EXPORTS)
def test_the_manifest_records_the_conversion(exports: Path, name: str) -> None:
    folder = exports / name
    _, tensors, manifest = opened(folder)
    source, settings = exports / f"{name}-source", recipe(exports, name)
    plan = make_plan(describe(read_config(source)), settings, "float32")
    assert manifest["format"] == "native"
    assert manifest["plan"] == json.loads(json.dumps(plan.to_dict()))
    assert {"transmla", "torch", "transformers", "safetensors", "python"} <= set(manifest["versions"])
    assert manifest["source"]["fingerprint"] == open_checkpoint(source).fingerprint()
    present = {p.name for p in folder.iterdir()} - {"transmla.json", "README.md"}
    assert set(manifest["hashes"]) == present
    assert all(file_sha256(folder / file) == digest for file, digest in manifest["hashes"].items())
    assert [layer["layer"] for layer in manifest["layers"]] == [0, 1]
    errors = [layer["relative_error"] for layer in manifest["layers"]]
    assert max(errors) < (1e-8 if name == "exact" else 1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors.shapes)
    size = sum(tensors.read(n).nbytes for n in tensors.shapes)
    assert index["metadata"]["total_size"] == size
    assert read_recipe(folder / "recipe.yaml", {}) == public_recipe(settings)


@pytest.mark.parametrize("name", EXPORTS)
def test_the_card_holds_table_recipe_and_command(exports: Path, name: str) -> None:
    card = (exports / name / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["mla", "transmla"]}
    _, _, manifest = opened(exports / name)
    shape, spec = manifest["plan"]["shape"], manifest["plan"]["spec"]
    before, after = (
        2 * spec["num_key_value_heads"] * spec["head_dim"],
        shape["kv_lora_rank"] + shape["qk_rope_head_dim"],
    )
    assert f"| cache values per token and layer | {before} | {after} ({after / before:.1%}) |" in body
    assert "transmla convert recipe.yaml" in body
    assert dump_recipe(public_recipe(recipe(exports, name))) in body
    assert all(note in body for note in manifest["plan"]["notes"])


@pytest.mark.parametrize("name", EXPORTS)
@torch.no_grad()
def test_the_measured_cache_has_the_planned_size(exports: Path, name: str) -> None:
    _, _, manifest = opened(exports / name)
    model = AutoModelForCausalLM.from_pretrained(exports / name, dtype="auto")
    tokens = torch.randint(0, 128, (3, 17))
    cache = model(tokens, use_cache=True).past_key_values
    measured = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    plan = make_plan(describe(read_config(exports / f"{name}-source")), recipe(exports, name), "float32")
    width = {"float32": 4, "bfloat16": 2}[manifest["plan"]["dtype"]]
    assert measured == plan.shape.cache_values * plan.spec.num_hidden_layers * width * tokens.numel()
