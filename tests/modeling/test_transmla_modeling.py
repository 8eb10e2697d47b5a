"""The transmla format: an uncut export of every family equals its source, and its cache contains latents only."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.uncut_exports import COMMON, FAMILIES, WINDOW, make_source, uncut
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

import transmla
from transmla.errors import TransmlaError
from transmla.modeling.configuration_transmla import TransmlaConfig, converted_config
from transmla.modeling.modeling_transmla import TransmlaAttention, TransmlaForCausalLM

# Tokens of a text, and padded tokens of the second text.
LENGTH, PADDING = 30, 5


@pytest.fixture(scope="module")
def texts() -> dict[str, torch.Tensor]:
    """Return two texts that are longer than any window; the second is padded on the left."""
    ids = torch.randint(3, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """Return a source, its uncut export as a loaded model, and the folder of the export."""
    folder = tmp_path_factory.mktemp(request.param)
    source = make_source(request.param, folder / "source")
    export = uncut(source, folder / "source", folder / "export")
    return source, TransmlaForCausalLM.from_pretrained(export, attn_implementation="eager").eval(), export


@torch.no_grad()
def test_an_uncut_export_equals_its_source(pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor]) -> None:
    source, export, _ = pair
    assert all(isinstance(layer.self_attn, TransmlaAttention) for layer in export.model.layers)
    real = texts["attention_mask"].bool()
    theirs, ours = (model(**texts).logits[real] for model in (source, export))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@torch.no_grad()
def test_every_weight_changes_the_logits(pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor]) -> None:
    """The previous test would therefore notice a wrong weight."""
    _, export, _ = pair
    before = export(**texts).logits
    for name, parameter in export.model.layers[0].self_attn.named_parameters():
        original = parameter.clone()
        parameter.add_(0.3 * torch.randn_like(parameter))
        assert (export(**texts).logits - before).abs().max() > 1e-3, name
        parameter.copy_(original)


def test_an_uncut_export_generates_the_same_tokens(pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor]) -> None:
    source, export, _ = pair
    settings = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert source.generate(**texts, **settings).equal(export.generate(**texts, **settings))


@torch.no_grad()
def test_token_by_token_equals_the_full_forward(pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor]) -> None:
    _, export, _ = pair
    ids, cache = texts["input_ids"][:1], DynamicCache(config=export.config)
    single = [export(ids[:, i : i + 1], past_key_values=cache).logits for i in range(LENGTH)]
    whole = export(ids, use_cache=False).logits
    assert (torch.cat(single, 1) - whole).abs().max() < 1e-4 * whole.abs().max()
    for layer, cached in zip(export.model.layers, cache.layers, strict=True):
        attention = layer.self_attn
        tokens = LENGTH if attention.sliding_window is None else WINDOW - 1
        assert cached.keys.shape == (1, 1, tokens, attention.kv_lora_rank)
        assert cached.values.shape == (1, 1, tokens, attention.qk_rope_head_dim)


@torch.no_grad()
def test_bfloat16_stays_close_to_the_source(pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor]) -> None:
    source, _, folder = pair
    half = TransmlaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    assert half.dtype == torch.bfloat16
    real = texts["attention_mask"].bool()
    theirs, ours = source(**texts).logits[real], half(**texts).logits[real].float()
    assert (ours - theirs).square().mean() < 0.01 * theirs.square().mean()


def test_a_saved_export_is_the_same(
    pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    _, export, folder = pair
    export.save_pretrained(tmp_path)
    assert {f.name for f in folder.iterdir()} <= {f.name for f in tmp_path.iterdir()}
    again = TransmlaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert again(**texts).logits.equal(export(**texts).logits)
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path)]
    for config in configs:
        config.pop("transformers_version", None)
    assert configs[0]["architectures"] == configs[1]["architectures"] == ["TransmlaForCausalLM"]
    assert configs[0]["mla"] == configs[1]["mla"]
    assert set(load_file(folder / "model.safetensors")) == set(load_file(tmp_path / "model.safetensors"))


# Script for a process that cannot import transmla.
WITHOUT_TRANSMLA = """
import sys
sys.modules["transmla"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
    bare = AutoModel.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
    ids = torch.arange(3, 12)[None]
    assert bare(ids).last_hidden_state.equal(model.model(ids).last_hidden_state)
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(
        folder + "-again", trust_remote_code=True, attn_implementation="eager"
    )
    assert again(ids).logits.equal(model(ids).logits)
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    print(config.model_type, *tokens[0].tolist())
"""


def test_exports_load_without_transmla(tmp_path: Path) -> None:
    folders, expected = [], []
    for family in FAMILIES:
        source = make_source(family, tmp_path / family)
        folders.append(str(uncut(source, tmp_path / family, tmp_path / f"{family}-mla")))
        tokens = source.generate(torch.arange(3, 12)[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
        expected.append(" ".join(["transmla", *map(str, tokens[0].tolist())]))
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRANSMLA, *folders], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert [line for line in process.stdout.splitlines() if line.startswith("transmla ")] == expected


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_some_layers_may_keep_their_attention(family: str, texts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = make_source(family, tmp_path / "source")
    folder = uncut(source, tmp_path / "source", tmp_path / "export", keep=(0,))
    export = TransmlaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert [isinstance(layer.self_attn, TransmlaAttention) for layer in export.model.layers] == [False, True]
    real = texts["attention_mask"].bool()
    theirs, ours = (model(**texts).logits[real] for model in (source, export))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_loading_an_export_does_not_change_the_family(tmp_path: Path) -> None:
    """Conversions of tensor names are registered by class name; those of the family's class must not change."""
    source = make_source("mixtral", tmp_path / "source")
    uncut(source, tmp_path / "source", tmp_path / "export")
    TransmlaForCausalLM.from_pretrained(tmp_path / "export")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "source", attn_implementation="eager")
    ids = torch.arange(3, 12)[None]
    assert again(ids).logits.equal(source(ids).logits)


def test_an_accelerated_export_generates_the_same(pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor]) -> None:
    """Decoding over the latent supports soft-caps and sinks."""
    source, _, folder = pair
    model = transmla.load(folder)
    calls, attention = [], model.model.layers[-1].self_attn
    decode = attention.decode
    attention.decode = lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs)
    settings = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert source.generate(**texts, **settings).equal(model.generate(**texts, **settings))
    assert calls


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, LENGTH])
def test_an_accelerated_export_equals_its_source_without_padding(
    pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor], length: int
) -> None:
    """Without a mask, in one forward and in chunks of 5 tokens."""
    source, _, folder = pair
    model, ids = transmla.load(folder), texts["input_ids"][:1, :length]
    expected = source(ids).logits
    assert (model(ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split(5, 1)]
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3"])
def test_acceleration_with_layers_that_kept_their_attention(
    family: str, texts: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    source = make_source(family, tmp_path / "source")
    model = transmla.load(uncut(source, tmp_path / "source", tmp_path / "export", keep=(0,)))
    real = texts["attention_mask"].bool()
    expected = source(**texts).logits[real]
    assert (model(**texts).logits[real] - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3"])
def test_a_shared_prefix_supports_soft_caps_and_sinks(family: str, tmp_path: Path) -> None:
    source = make_source(family, tmp_path / "source", layer_types=["full_attention"] * 2, use_sliding_window=False)
    model = transmla.load(uncut(source, tmp_path / "source", tmp_path / "export"))
    prompt = torch.arange(3, 15)[None]
    texts = torch.cat([prompt.expand(3, -1), torch.tensor([[20, 21], [5, 4], [33, 7]])], 1)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = transmla.shared_prefix(model, prompt)
    actual = model.generate(texts, attention_mask=torch.ones_like(texts), past_key_values=cache, **settings)
    assert actual.equal(source.generate(texts, attention_mask=torch.ones_like(texts), **settings))


def test_residual_dropout_is_applied(tmp_path: Path) -> None:
    source = make_source("starcoder2", tmp_path / "source", residual_dropout=0.9)
    export = TransmlaForCausalLM.from_pretrained(uncut(source, tmp_path / "source", tmp_path / "export"))
    x, positions = torch.randn(1, 20, 48), torch.arange(20)[None]
    attention = export.model.layers[0].self_attn
    outputs = [attention.train(training)(x, position_ids=positions)[0] for training in (True, False)]
    assert 0.8 < (outputs[0] == 0).float().mean() < 1
    assert not (outputs[1] == 0).any()


def test_a_window_is_ignored_for_a_family_without_windows(tmp_path: Path) -> None:
    source = make_source("llama", tmp_path / "source", sliding_window=WINDOW)
    export = TransmlaForCausalLM.from_pretrained(uncut(source, tmp_path / "source", tmp_path / "export"))
    assert export.model.layers[0].self_attn.sliding_window is None


def test_windows_refuse_float8_rows_and_shared_prefixes(tmp_path: Path) -> None:
    source = make_source("mistral", tmp_path / "source")
    folder = uncut(source, tmp_path / "source", tmp_path / "export")
    with pytest.raises(TransmlaError, match="sliding windows"):
        transmla.load(folder, cache_dtype="float8_e4m3fn")
    with pytest.raises(TransmlaError, match="sliding windows"):
        transmla.shared_prefix(transmla.load(folder), torch.arange(3, 7)[None])


def test_layers_that_kept_their_attention_refuse_a_shared_prefix(tmp_path: Path) -> None:
    source = make_source("qwen3", tmp_path / "source")
    folder = uncut(source, tmp_path / "source", tmp_path / "export", keep=(0,))
    with pytest.raises(TransmlaError, match="1 of 2 layers of TransmlaQwen3ForCausalLM kept the source's attention"):
        transmla.shared_prefix(transmla.load(folder), torch.arange(3, 7)[None])


def test_exports_are_pickled_inspected_and_loaded_as_any_model(pair: tuple[Any, Any, Path]) -> None:
    source, export, folder = pair
    ids = torch.arange(3, 12)[None]
    fast = transmla.load(folder)
    for model, again in (
        (fast, pickle.loads(pickle.dumps(fast))),
        (export, pickle.loads(pickle.dumps(export))),
        (export, copy.deepcopy(export)),
    ):
        weights = again.state_dict()
        assert all(tensor.equal(weights[name]) for name, tensor in model.state_dict().items())
        # Products of experts sum in an order that depends on where their weights lie in memory.
        assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    assert type(pickle.loads(pickle.dumps(export.config))) is type(export.config)
    theirs, ours = (model(ids, output_attentions=True).attentions for model in (source, export))
    assert len(ours) == len(theirs)
    assert torch.allclose(ours[0], theirs[0], atol=1e-4)
    assert TransmlaForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float32


def test_missing_tensors_are_initialised(texts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = make_source("qwen3", tmp_path / "source")
    folder = uncut(source, tmp_path / "source", tmp_path / "export")
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if "q_b_proj" not in n}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for kind in config["mla"]["kinds"]:
        kind["latent_norm"] = True
    (folder / "config.json").write_text(json.dumps(config))
    attention = TransmlaForCausalLM.from_pretrained(folder).model.layers[0].self_attn
    fresh = TransmlaForCausalLM._from_config(TransmlaConfig.from_dict(config)).model.layers[0].self_attn
    for made in (attention, fresh):
        assert made.kv_a_layernorm.weight.eq(1).all()
        assert 0.01 < made.q_b_proj.weight.std() < 0.03
        assert made.frequencies.bits.any()
    assert 0.01 < fresh.kv_b_proj.weight.std() < 0.03


# Family: (changes of its config, the feature that the error names).
UNKNOWN = {
    "hunyuan_v1_dense": ({}, "query_layernorm"),
    "olmo": ({"clip_qkv": 0.5}, "clip_qkv"),
    "llama": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
}


@pytest.mark.parametrize("family", UNKNOWN)
def test_unsupported_features_are_refused(family: str) -> None:
    changes, feature = UNKNOWN[family]
    kind = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    kind |= {"inv_freq": [1.0, 0.1], "attention_factor": 1.0, "latent_norm": False}
    config = converted_config(AutoConfig.for_model(family, **(COMMON | changes)), {"layers": [0, 0], "kinds": [kind]})
    with pytest.raises(ValueError, match=feature):
        TransmlaForCausalLM._from_config(config)
    with pytest.raises(ValueError, match="source_model_type"):
        TransmlaConfig.from_dict({"model_type": family})
    with pytest.raises(TypeError, match="from_pretrained"):
        TransmlaForCausalLM(config)


@torch.no_grad()
def test_auto_classes_load_exports_after_register(texts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = make_source("qwen3", tmp_path / "source")
    folder = uncut(source, tmp_path / "source", tmp_path / "export")
    transmla.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    bare = AutoModel.from_pretrained(folder, attn_implementation="eager")
    assert type(model).__module__ == "transmla.modeling.modeling_transmla"
    assert AutoConfig.from_pretrained(folder).source_model_type == "qwen3"
    real = texts["attention_mask"].bool()
    assert (model(**texts).logits[real] - source(**texts).logits[real]).abs().max() < 1e-3
    assert bare(**texts).last_hidden_state.equal(model.model(**texts).last_hidden_state)
    made = AutoModelForCausalLM.from_config(model.config)
    assert type(made) is type(model)


def test_gradients_and_adapters_reach_all_projections(texts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    source = make_source("qwen3", tmp_path / "source")
    folder = uncut(source, tmp_path / "source", tmp_path / "export")
    model = TransmlaForCausalLM.from_pretrained(folder)
    model(**texts, labels=texts["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    adapted(**texts, labels=texts["input_ids"]).loss.backward()
    adapted_names = [
        name for name, parameter in adapted.named_parameters() if "lora_B" in name and parameter.grad.any()
    ]
    # q_proj, k_proj, v_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj and three MLP projections; not q_b_proj, which is no
    # nn.Linear.
    assert len(adapted_names) == 9 * len(model.model.layers)
    assert not any("q_b_proj" in name for name in adapted_names)


def test_trainer_trains_saves_and_resumes(texts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = make_source("qwen3", tmp_path / "source")
    model = TransmlaForCausalLM.from_pretrained(uncut(source, tmp_path / "source", tmp_path / "export"))
    rows = [{"input_ids": row, "labels": row} for row in texts["input_ids"]]
    arguments = {"save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "report_to": [], "use_cpu": True}

    def trainer(model: Any, steps: int, checkpointing: bool) -> Trainer:
        more = {"max_steps": steps, "gradient_checkpointing": checkpointing}
        return Trainer(model, TrainingArguments(str(tmp_path / "run"), **arguments, **more), train_dataset=rows)

    first = trainer(model, 4, False)
    first.train()
    losses = [point["loss"] for point in first.state.log_history if "loss" in point]
    assert losses[-1] < losses[0]
    again = TransmlaForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert again(**texts).logits.equal(model.eval()(**texts).logits)
    last = trainer(again, 6, True)
    last.train(resume_from_checkpoint=True)
    assert last.state.global_step == 6


def test_the_cache_holds_normalised_latents(texts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = make_source("llama", tmp_path / "source")
    config = json.loads((uncut(source, tmp_path / "source", tmp_path / "export") / "config.json").read_text())
    for kind in config["mla"]["kinds"]:
        kind["latent_norm"] = True
    model = TransmlaForCausalLM._from_config(TransmlaConfig.from_dict(config)).eval()
    cache, ids = DynamicCache(config=model.config), texts["input_ids"][:1]
    with torch.no_grad():
        model.model.layers[0].self_attn.kv_a_layernorm.weight.mul_(2.0)
        single = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(LENGTH)]
        assert (torch.cat(single, 1) - model(ids, use_cache=False).logits).abs().max() < 1e-4
    assert cache.layers[0].keys.square().mean().sqrt() == pytest.approx(2.0, rel=0.02)
