"""An accelerated model gives the same results as before in every mode of generate(); nothing else changes."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mla_models import FAMILIES, PROMPT, prompt, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, pipeline

import transmla
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.kernels import DecodeShape, backends, choose_backend
from transmla.kernels.custom_op import Compilable
from transmla.recipe import Recipe
from transmla.runtime.latent_attention import LatentAttention
from transmla.runtime.latent_cache import LatentLayer, latent_bytes
from transmla.runtime.load import mla_layers


def count_decodes(model: Any) -> list[int]:
    """Return a list that receives the cache length T at every later call of the backend."""
    lengths: list[int] = []
    for layer in model.modules():
        if isinstance(layer, LatentAttention):

            def counted(*args: Any, decode: Any = layer.decode, **kwargs: Any) -> Any:
                lengths.append(args[2].total)
                return decode(*args, **kwargs)

            layer.decode = counted
    return lengths


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens(family: str, way: str) -> None:
    model = tiny(family)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **WAYS[way]}
    inputs = prompt()
    if way == "prompt lookup":  # supports one sequence, which must repeat itself
        inputs = {name: t[1:].repeat(1, 2) for name, t in inputs.items()}

    def generate() -> Tensor:
        torch.manual_seed(3)
        return model.generate(**inputs, **settings)

    expected = generate()
    transmla.accelerate(model)
    decoded = count_decodes(model)
    assert torch.equal(generate(), expected)
    assert bool(decoded) == (way != "no cache")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_token_by_token_equals_the_full_forward(dtype: torch.dtype) -> None:
    model = transmla.accelerate(tiny(first_k_dense_replace=2).to(dtype))  # experts do not support float64
    tokens = prompt(0)["input_ids"]
    full = model(tokens, use_cache=False).logits
    cache, pieces = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start, stop in ((0, 7), (7, 8), (8, 12), (12, 13), (13, 20)):  # some steps have several new tokens
            pieces.append(model(tokens[:, start:stop], past_key_values=cache).logits)
    difference = (torch.cat(pieces, 1) - full).norm() / full.norm()
    assert difference < {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)


def test_the_cache_holds_latents_only_and_grows_in_place() -> None:
    model = transmla.accelerate(tiny())
    cache = DynamicCache(config=model.config)
    tokens = torch.randint(2, 96, (2, 30))
    with torch.no_grad():
        model(tokens[:, :10], past_key_values=cache)
        rows = [layer.rows for layer in cache.layers]
        for i in range(10, 30):
            model(tokens[:, i : i + 1], past_key_values=cache)
    assert all(type(layer) is LatentLayer for layer in cache.layers)
    assert all(layer.rows is before for layer, before in zip(cache.layers, rows, strict=True))
    assert latent_bytes(cache) == 2 * 30 * (16 + 8) * model.config.num_hidden_layers * 4


def test_a_cache_filled_before_acceleration_is_used() -> None:
    model = tiny()
    tokens = prompt(0)["input_ids"]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits[:, -1]
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
        transmla.accelerate(model)
        actual = model(tokens[:, -1:], past_key_values=cache).logits[:, -1]
    assert torch.allclose(actual, expected, atol=1e-5)


def test_training_gives_the_same_gradients() -> None:
    model = tiny().train()
    tokens = prompt(0)["input_ids"]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    transmla.accelerate(model)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        for actual, gradient in zip(gradients(), expected, strict=True):
            assert torch.allclose(actual, gradient, atol=1e-5)


def test_gradients_flow_through_a_cache_that_is_kept() -> None:
    """The second piece of a sequence attends to the latents of the first, within one autograd graph."""
    gradients = []
    for change in (lambda model: model, transmla.accelerate):
        model = change(tiny())
        tokens = prompt(0)["input_ids"]
        cache = DynamicCache(config=model.config)
        model(tokens[:, :12], past_key_values=cache)
        model(tokens[:, 12:13], past_key_values=cache).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients[::-1], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_model_without_mla_is_refused(make_source: Callable[..., Path]) -> None:
    with pytest.raises(TransmlaError, match="no MLA layer"):
        transmla.load(make_source())


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nosuch", "a/b/c", "https://huggingface.co/org/name"])
def test_a_name_that_is_no_path_and_no_hub_id_is_refused_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *args, **kwargs: pytest.fail("hub"))
    with pytest.raises(TransmlaError, match=f"model '{name}' does not exist"):
        transmla.load(name)


def test_the_folder_of_an_unfinished_conversion_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *args, **kwargs: pytest.fail("hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smol-mla.partial").mkdir()
    with pytest.raises(TransmlaError, match=r"smol-mla\.partial holds no finished conversion"):
        transmla.load("smol-mla.partial")
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed" / "progress.json").write_text("{}")
    with pytest.raises(TransmlaError, match="renamed holds no finished conversion"):
        transmla.load("renamed")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(TransmlaError, match=r"unknown backend 'cuda'.*torch"):
        transmla.accelerate(tiny(), backend="cuda")


def test_a_backend_that_refuses_is_logged_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    shape = DecodeShape(4, 16, 8, torch.float32, torch.device("cpu"))
    refusing = [name for name, backend in backends().items() if backend.refuses(shape)]
    for name in refusing:
        with caplog.at_level(logging.WARNING):
            assert choose_backend(name, shape).name == "torch"
        assert name in caplog.text
        caplog.clear()


def test_a_model_that_changes_dtype_gets_a_new_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = transmla.accelerate(tiny(first_k_dense_replace=2)), prompt()
    layer = model.model.layers[0].self_attn
    requests: list[DecodeShape] = []
    monkeypatch.setattr(
        "transmla.runtime.load.choose_for_device", lambda name, shape: requests.append(shape) or backends()["torch"]
    )
    model.generate(**inputs, max_new_tokens=2)
    assert requests == []
    model.double().generate(**inputs, max_new_tokens=2)
    assert {shape.dtype for shape in requests} == {torch.float64}
    assert layer.placed_for[0] == torch.float64
    assert layer.prefix is None


def test_additive_masks_are_added_to_the_scores() -> None:
    model, tokens = tiny(), prompt(0)["input_ids"]
    mask = torch.zeros(2, 1, 1, PROMPT + 1)
    mask[..., 3:9] = -2.5
    logits = []
    for change in (lambda _: None, transmla.accelerate):
        change(model)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens, past_key_values=cache)
            logits.append(model(tokens[:, :1], past_key_values=cache, attention_mask=mask).logits)
    assert torch.allclose(*logits, atol=1e-4)


def test_accelerating_twice_or_saving_changes_nothing(tmp_path: Path) -> None:
    model = tiny()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    untouched = tiny()
    transmla.accelerate(transmla.accelerate(model))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again.model.layers[0].self_attn) is type(untouched.model.layers[0].self_attn)
    assert all(torch.equal(t, before[name]) for name, t in again.state_dict().items())
    inputs = prompt()
    assert torch.equal(
        again.generate(**inputs, max_new_tokens=8, do_sample=False),
        untouched.generate(**inputs, max_new_tokens=8, do_sample=False),
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_generate_the_same_tokens(copied: Callable[[Any], Any]) -> None:
    model, inputs = transmla.accelerate(tiny()), prompt()
    twin = copied(model)
    decoded = count_decodes(twin)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(twin.generate(**inputs, **settings), model.generate(**inputs, **settings))
    assert decoded


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_models_whose_classes_torch_has_subclassed_are_copied(copied: Callable[[Any], Any]) -> None:
    """As ``fully_shard`` and ``register_parametrization`` do."""
    model, inputs = transmla.accelerate(tiny()), prompt()
    for module in (model, *mla_layers(model), model.model.norm):
        module.__class__ = type(f"Sharded{type(module).__name__}", (type(module),), {})
    twin = copied(model)
    decoded = count_decodes(twin)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(twin.generate(**inputs, **settings), model.generate(**inputs, **settings))
    assert decoded


@pytest.mark.parametrize("opaque_to_compile", [False, True], ids=["traced", "one operator"])
def test_a_step_compiles_to_one_graph(opaque_to_compile: bool) -> None:
    model, tokens = transmla.accelerate(tiny(first_k_dense_replace=2)), prompt(0)["input_ids"]
    if opaque_to_compile:
        for module in model.modules():
            if isinstance(module, LatentAttention):
                module.decode = Compilable("torch")
    graphs: list[Any] = []
    caches = [StaticCache(config=model.config, max_cache_len=PROMPT + 4) for _ in range(2)]
    step = torch.compile(model.forward, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    with torch.no_grad():
        for cache in caches:
            model(tokens, past_key_values=cache)
        for _ in range(2):
            compiled = step(tokens[:, :1], past_key_values=caches[0]).logits
            assert torch.allclose(compiled, model(tokens[:, :1], past_key_values=caches[1]).logits, atol=1e-5)
    assert len(graphs) == 1
    called = [node.target for node in graphs[0].graph.nodes]
    assert [str(target) for target in called].count("transmla.decode_torch.default") == (2 if opaque_to_compile else 0)


def test_an_export_loads_and_generates_text(
    make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    folder = convert(make_recipe(make_source(), cache_ratio=0.5))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model = transmla.load(folder, dtype="auto", backend="torch")
    tokens = torch.randint(2, 96, (1, 9))
    settings = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(model.generate(tokens, **settings), stock.generate(tokens, **settings))
    from transformers import AutoTokenizer

    writer = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert len(writer("the cat", max_new_tokens=4)[0]["generated_text"]) > len("the cat")


@pytest.mark.parametrize("call", [transmla.accelerate, lambda given: transmla.shared_prefix(given, torch.ones(1, 2))])
@pytest.mark.parametrize("part", [lambda model: None, lambda model: "a/folder", lambda model: model.model.layers[0]])
def test_what_is_no_whole_model_is_refused_and_left_unchanged(
    call: Callable[[Any], Any], part: Callable[[Any], Any]
) -> None:
    model = tiny()
    with pytest.raises(TransmlaError, match=r"got an object of type .*; it takes a whole transformers model"):
        call(part(model))
    assert not any(isinstance(module, LatentAttention) for module in model.modules())


def test_loading_information_comes_beside_the_model(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    model, information = transmla.load(tmp_path, output_loading_info=True)
    assert mla_layers(model)
    assert not information["missing_keys"]
