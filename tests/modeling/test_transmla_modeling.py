"""The own format: every family with nothing cut is its source, and its cache holds latents."""

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

LENGTH, PADDING = 30, 5


@pytest.fixture(scope="module")
def texts() -> dict[str, torch.Tensor]:
    """Two texts longer than any window, the second padded on the left."""
    ids = torch.randint(3, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A source, its uncut export loaded as transmla loads it, and the export's folder."""
    folder = tmp_path_factory.mktemp(request.param)
    source = make_source(request.param, folder / "source")
    export = uncut(source, folder / "source", folder / "export")
    return source, TransmlaForCausalLM.from_pretrained(export, attn_implementation="eager").eval(), export


@torch.no_grad()
def test_nothing_cut_is_the_source(pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor]) -> None:
    source, export, _ = pair
    assert all(isinstance(layer.self_attn, TransmlaAttention) for layer in export.model.layers)
    seen = texts["attention_mask"].bool()
    theirs, ours = (model(**texts).logits[seen] for model in (source, export))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@torch.no_grad()
def test_it_notices_every_weight(pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor]) -> None:
    """So the test before this one would, too."""
    _, export, _ = pair
    before = export(**texts).logits
    for name, parameter in export.model.layers[0].self_attn.named_parameters():
        kept = parameter.clone()
        parameter.add_(0.3 * torch.randn_like(parameter))
        assert (export(**texts).logits - before).abs().max() > 1e-3, name
        parameter.copy_(kept)


def test_it_generates_what_the_source_does(pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor]) -> None:
    source, export, _ = pair
    wanted = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert source.generate(**texts, **wanted).equal(export.generate(**texts, **wanted))


@torch.no_grad()
def test_token_by_token_is_the_whole_forward(pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor]) -> None:
    _, export, _ = pair
    ids, cache = texts["input_ids"][:1], DynamicCache(config=export.config)
    single = [export(ids[:, i : i + 1], past_key_values=cache).logits for i in range(LENGTH)]
    whole = export(ids, use_cache=False).logits
    assert (torch.cat(single, 1) - whole).abs().max() < 1e-4 * whole.abs().max()
    for layer, held in zip(export.model.layers, cache.layers, strict=True):
        attention = layer.self_attn
        tokens = LENGTH if attention.sliding_window is None else WINDOW - 1
        assert held.keys.shape == (1, 1, tokens, attention.kv_lora_rank)
        assert held.values.shape == (1, 1, tokens, attention.qk_rope_head_dim)


@torch.no_grad()
def test_bfloat16_is_close(pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor]) -> None:
    source, _, folder = pair
    half = TransmlaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    assert half.dtype == torch.bfloat16
    seen = texts["attention_mask"].bool()
    theirs, ours = source(**texts).logits[seen], half(**texts).logits[seen].float()
    assert (ours - theirs).square().mean() < 0.01 * theirs.square().mean()


def test_saved_again_it_is_the_same(
    pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    _, export, folder = pair
    export.save_pretrained(tmp_path)
    assert {f.name for f in folder.iterdir()} <= {f.name for f in tmp_path.iterdir()}
    again = TransmlaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert again(**texts).logits.equal(export(**texts).logits)
    told = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path)]
    for config in told:
        config.pop("transformers_version", None)
    assert told[0]["architectures"] == told[1]["architectures"] == ["TransmlaForCausalLM"]
    assert told[0]["mla"] == told[1]["mla"]
    assert set(load_file(folder / "model.safetensors")) == set(load_file(tmp_path / "model.safetensors"))


STRANGER = """
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


def test_it_loads_where_transmla_is_not(tmp_path: Path) -> None:
    folders, wanted = [], []
    for family in FAMILIES:
        source = make_source(family, tmp_path / family)
        folders.append(str(uncut(source, tmp_path / family, tmp_path / f"{family}-mla")))
        tokens = source.generate(torch.arange(3, 12)[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
        wanted.append(" ".join(["transmla", *map(str, tokens[0].tolist())]))
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *folders], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("transmla ")] == wanted


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_some_layers_may_keep_their_attention(family: str, texts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = make_source(family, tmp_path / "source")
    folder = uncut(source, tmp_path / "source", tmp_path / "export", keep=(0,))
    export = TransmlaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert [isinstance(layer.self_attn, TransmlaAttention) for layer in export.model.layers] == [False, True]
    seen = texts["attention_mask"].bool()
    theirs, ours = (model(**texts).logits[seen] for model in (source, export))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_stock_model_is_no_other_for_it(tmp_path: Path) -> None:
    """Conversions of tensor names are registered by class: the family's own are what they were."""
    source = make_source("mixtral", tmp_path / "source")
    uncut(source, tmp_path / "source", tmp_path / "export")
    TransmlaForCausalLM.from_pretrained(tmp_path / "export")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "source", attn_implementation="eager")
    ids = torch.arange(3, 12)[None]
    assert again(ids).logits.equal(source(ids).logits)


def test_accelerated_it_generates_the_same(pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor]) -> None:
    """Over the latent itself, soft-caps and sinks included."""
    source, _, folder = pair
    model = transmla.load(folder)
    calls, attention = [], model.model.layers[-1].self_attn
    decode = attention.decode
    attention.decode = lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs)
    wanted = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert source.generate(**texts, **wanted).equal(model.generate(**texts, **wanted))
    assert calls


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, LENGTH])
def test_accelerated_it_is_the_source_without_padding(
    pair: tuple[Any, Any, Path], texts: dict[str, torch.Tensor], length: int
) -> None:
    """Where all masks are left out, and in chunks."""
    source, _, folder = pair
    model, ids = transmla.load(folder), texts["input_ids"][:1, :length]
    wanted = source(ids).logits
    assert (model(ids).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split(5, 1)]
    assert (torch.cat(parts, 1) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3"])
def test_accelerated_with_layers_that_kept_their_attention(
    family: str, texts: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    source = make_source(family, tmp_path / "source")
    model = transmla.load(uncut(source, tmp_path / "source", tmp_path / "export", keep=(0,)))
    seen = texts["attention_mask"].bool()
    wanted = source(**texts).logits[seen]
    assert (model(**texts).logits[seen] - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3"])
def test_a_shared_prefix_is_capped_and_sinks_have_their_share_once(family: str, tmp_path: Path) -> None:
    source = make_source(family, tmp_path / "source", layer_types=["full_attention"] * 2, use_sliding_window=False)
    model = transmla.load(uncut(source, tmp_path / "source", tmp_path / "export"))
    prompt = torch.arange(3, 15)[None]
    texts = torch.cat([prompt.expand(3, -1), torch.tensor([[20, 21], [5, 4], [33, 7]])], 1)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = transmla.shared_prefix(model, prompt)
    found = model.generate(texts, attention_mask=torch.ones_like(texts), past_key_values=cache, **settings)
    assert found.equal(source.generate(texts, attention_mask=torch.ones_like(texts), **settings))


def test_dropout_behind_the_attention_is_the_familys(tmp_path: Path) -> None:
    source = make_source("starcoder2", tmp_path / "source", residual_dropout=0.9)
    export = TransmlaForCausalLM.from_pretrained(uncut(source, tmp_path / "source", tmp_path / "export"))
    x, positions = torch.randn(1, 20, 48), torch.arange(20)[None]
    attention = export.model.layers[0].self_attn
    outputs = [attention.train(training)(x, position_ids=positions)[0] for training in (True, False)]
    assert 0.8 < (outputs[0] == 0).float().mean() < 1
    assert not (outputs[1] == 0).any()


def test_a_window_in_the_config_of_a_family_without_one_is_none(tmp_path: Path) -> None:
    source = make_source("llama", tmp_path / "source", sliding_window=WINDOW)
    export = TransmlaForCausalLM.from_pretrained(uncut(source, tmp_path / "source", tmp_path / "export"))
    assert export.model.layers[0].self_attn.sliding_window is None


def test_windows_refuse_what_would_be_wrong_behind_them(tmp_path: Path) -> None:
    source = make_source("mistral", tmp_path / "source")
    folder = uncut(source, tmp_path / "source", tmp_path / "export")
    with pytest.raises(TransmlaError, match="sliding windows"):
        transmla.load(folder, cache_dtype="float8_e4m3fn")
    with pytest.raises(TransmlaError, match="sliding windows"):
        transmla.shared_prefix(transmla.load(folder), torch.arange(3, 7)[None])


def test_layers_that_kept_their_attention_share_no_prefix(tmp_path: Path) -> None:
    source = make_source("qwen3", tmp_path / "source")
    folder = uncut(source, tmp_path / "source", tmp_path / "export", keep=(0,))
    with pytest.raises(TransmlaError, match="1 layers of TransmlaQwen3ForCausalLM kept the source's attention"):
        transmla.shared_prefix(transmla.load(folder), torch.arange(3, 7)[None])


def test_it_is_pickled_inspected_and_loaded_as_any_model(pair: tuple[Any, Any, Path]) -> None:
    source, export, folder = pair
    ids = torch.arange(3, 12)[None]
    fast = transmla.load(folder)
    assert pickle.loads(pickle.dumps(fast))(ids).logits.equal(fast(ids).logits)
    again = pickle.loads(pickle.dumps(export))
    assert again(ids).logits.equal(export(ids).logits)
    assert type(pickle.loads(pickle.dumps(export.config))) is type(export.config)
    assert copy.deepcopy(export)(ids).logits.equal(export(ids).logits)
    theirs, ours = (model(ids, output_attentions=True).attentions for model in (source, export))
    assert len(ours) == len(theirs)
    assert torch.allclose(ours[0], theirs[0], atol=1e-4)
    assert TransmlaForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float32


def test_what_a_checkpoint_lacks_begins_as_it_should(texts: dict[str, torch.Tensor], tmp_path: Path) -> None:
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


UNKNOWN = {
    "hunyuan_v1_dense": ({}, "query_layernorm"),
    "olmo": ({"clip_qkv": 0.5}, "clip_qkv"),
    "llama": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
}


@pytest.mark.parametrize("family", UNKNOWN)
def test_what_it_would_leave_out_is_refused(family: str) -> None:
    changes, named = UNKNOWN[family]
    kind = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    kind |= {"inv_freq": [1.0, 0.1], "attention_factor": 1.0, "latent_norm": False}
    config = converted_config(AutoConfig.for_model(family, **(COMMON | changes)), {"layers": [0, 0], "kinds": [kind]})
    with pytest.raises(ValueError, match=named):
        TransmlaForCausalLM._from_config(config)
    with pytest.raises(ValueError, match="source_model_type"):
        TransmlaConfig.from_dict({"model_type": family})
    with pytest.raises(TypeError, match="from_pretrained"):
        TransmlaForCausalLM(config)


@torch.no_grad()
def test_auto_classes_read_it_once_registered(texts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = make_source("qwen3", tmp_path / "source")
    folder = uncut(source, tmp_path / "source", tmp_path / "export")
    transmla.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    bare = AutoModel.from_pretrained(folder, attn_implementation="eager")
    assert type(model).__module__ == "transmla.modeling.modeling_transmla"
    assert AutoConfig.from_pretrained(folder).source_model_type == "qwen3"
    seen = texts["attention_mask"].bool()
    assert (model(**texts).logits[seen] - source(**texts).logits[seen]).abs().max() < 1e-3
    assert bare(**texts).last_hidden_state.equal(model.model(**texts).last_hidden_state)
    made = AutoModelForCausalLM.from_config(model.config)
    assert type(made) is type(model)


def test_adapters_and_gradients_are_as_with_any_model(texts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    source = make_source("qwen3", tmp_path / "source")
    folder = uncut(source, tmp_path / "source", tmp_path / "export")
    model = TransmlaForCausalLM.from_pretrained(folder)
    model(**texts, labels=texts["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    adapted(**texts, labels=texts["input_ids"]).loss.backward()
    grown = [name for name, parameter in adapted.named_parameters() if "lora_B" in name and parameter.grad.any()]
    # Queries, keys, values and what is cached of them, what expands it, the output, and an MLP of three; not the maps
    # of each head's own queries.
    assert len(grown) == 9 * len(model.model.layers)
    assert not any("q_b_proj" in name for name in grown)


def test_trainer_learns_saves_and_goes_on(texts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = make_source("qwen3", tmp_path / "source")
    model = TransmlaForCausalLM.from_pretrained(uncut(source, tmp_path / "source", tmp_path / "export"))
    rows = [{"input_ids": row, "labels": row} for row in texts["input_ids"]]
    given = {"save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "report_to": [], "use_cpu": True}

    def trainer(model: Any, steps: int, checkpointing: bool) -> Trainer:
        more = {"max_steps": steps, "gradient_checkpointing": checkpointing}
        return Trainer(model, TrainingArguments(str(tmp_path / "run"), **given, **more), train_dataset=rows)

    first = trainer(model, 4, False)
    first.train()
    losses = [point["loss"] for point in first.state.log_history if "loss" in point]
    assert losses[-1] < losses[0]
    again = TransmlaForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert again(**texts).logits.equal(model.eval()(**texts).logits)
    last = trainer(again, 6, True)
    last.train(resume_from_checkpoint=True)
    assert last.state.global_step == 6


def test_a_learned_latent_norm_is_part_of_the_cache(texts: dict[str, torch.Tensor], tmp_path: Path) -> None:
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
