"""The source is the model that transformers would run: its files, its head and the rules of its attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.edit_json import edit_json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import transmla
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.evaluate.verify import verify
from transmla.recipe import Recipe
from transmla.source.load import load_model
from transmla.source.open_source import open_source

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FORMATS = ("native", "transmla")
DEEP = {"num_hidden_layers": 3}
Make = Callable[..., Any]


def stock(folder: Path) -> Any:
    """Load a folder as stock transformers does."""
    transmla.register()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()


def edit_config(source: Path, **changes: Any) -> None:
    edit_json(source / "config.json", **changes)


def edit_tensors(source: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = source / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def same_head(source: Path, export: Path) -> bool:
    """Whether both models apply the same head, and the same embedding."""
    left, right = stock(source).state_dict(), stock(export).state_dict()
    return torch.equal(left[HEAD], right[HEAD]) and torch.equal(left[EMBEDDING], right[EMBEDDING])


@pytest.mark.parametrize("form", FORMATS)
def test_a_head_of_its_own_is_kept_though_the_config_ties_it(make_source: Make, make_recipe: Make, form: str) -> None:
    source = make_source(**DEEP)
    edit_config(source, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    assert not torch.equal(tensors[HEAD], tensors[EMBEDDING])
    export = convert(make_recipe(source, cache_ratio=0.5, format=form))
    assert same_head(source, export)
    assert torch.equal(stock(export).state_dict()[HEAD], tensors[HEAD])
    assert json.loads((export / "config.json").read_text())["tie_word_embeddings"] is False
    assert all(check.passed for check in verify(export, source=str(source)))


@pytest.mark.parametrize(
    ("form", "stored"),
    [
        ("native", "without a head"),
        ("native", "with an equal head"),
        ("transmla", "with an equal head"),
        ("native", "with an equal head of another precision"),
    ],
)
def test_a_tied_head_stays_the_embedding(make_source: Make, make_recipe: Make, form: str, stored: str) -> None:
    source = make_source(**DEEP, tie_word_embeddings=True)
    if stored != "without a head":

        def add(tensors: dict[str, torch.Tensor]) -> None:
            rounded = tensors[EMBEDDING].bfloat16()
            tensors[EMBEDDING] = rounded.float()
            tensors[HEAD] = rounded if "precision" in stored else rounded.float()

        edit_tensors(source, add)
    assert open_source(make_recipe(source)).spec.tie_word_embeddings
    export = convert(make_recipe(source, cache_ratio=0.5, format=form))
    assert same_head(source, export)


def test_families_that_tie_by_default_keep_a_head_of_their_own(make_source: Make, make_recipe: Make) -> None:
    source = make_source("starcoder2", **DEEP)
    edit_tensors(source, lambda tensors: tensors.update({HEAD: torch.randn_like(tensors[EMBEDDING])}))
    export = convert(make_recipe(source, cache_ratio=0.5))
    assert same_head(source, export)
    assert not torch.equal(stock(export).state_dict()[HEAD], stock(export).state_dict()[EMBEDDING])


@pytest.mark.parametrize(
    ("tied", "change", "message"),
    [
        (False, lambda tensors: tensors.pop(HEAD), f"the first is '{HEAD}'"),
        (True, lambda tensors: tensors.pop(EMBEDDING), f"the first is '{EMBEDDING}'"),
        (True, lambda tensors: tensors.update({HEAD: tensors[HEAD][:100].clone()}), f"'{HEAD}' has shape"),
    ],
)
def test_heads_that_transformers_would_make_up_are_refused(
    make_source: Make, make_recipe: Make, tied: bool, change: Any, message: str
) -> None:
    source = make_source(**DEEP)
    edit_config(source, tie_word_embeddings=tied)
    edit_tensors(source, change)
    with pytest.raises(TransmlaError, match=message):
        open_source(make_recipe(source))


@pytest.fixture
def doubled(make_source: Make) -> Path:
    """A source in several shards, and beside their index another model in a single file."""
    source: Path = make_source(**DEEP)
    stock(source).save_pretrained(source / "sharded", max_shard_size="40KB")
    for file in (source / "sharded").glob("model*"):
        file.rename(source / file.name)
    edit_tensors(source, lambda tensors: tensors.update({name: 2 * tensor for name, tensor in tensors.items()}))
    return source


def check_conversion(source: Path, recipe: Recipe) -> None:
    """Check that the conversion and transmla's loader read the model that stock transformers loads from ``source``."""
    expected = stock(source).state_dict()
    checkpoint = open_source(recipe).checkpoint
    assert all(torch.equal(checkpoint.read(name), expected[name]) for name in checkpoint.shapes)
    loaded = load_model(source, dtype=torch.float32, allow_pickle=recipe.allow_pickle).state_dict()
    assert torch.equal(loaded[EMBEDDING], expected[EMBEDDING])
    export = stock(convert(recipe)).state_dict()
    assert torch.equal(export[EMBEDDING], expected[EMBEDDING])


def test_a_single_file_wins_over_shards(doubled: Path, make_recipe: Make) -> None:
    check_conversion(doubled, make_recipe(doubled, cache_ratio=0.5))


def test_shards_win_over_files_that_transformers_does_not_choose(doubled: Path, make_recipe: Make) -> None:
    """A variant, a shard that the index does not name, and pickled weights, each of another model."""
    other = load_file(doubled / "model.safetensors")
    (doubled / "model.safetensors").rename(doubled / "model.fp16.safetensors")
    save_file(other, doubled / "model-00009-of-00009.safetensors", {"format": "pt"})
    torch.save(other, doubled / "pytorch_model.bin")
    assert not torch.equal(stock(doubled).state_dict()[EMBEDDING], other[EMBEDDING])
    check_conversion(doubled, make_recipe(doubled, cache_ratio=0.5, allow_pickle=True))


def test_a_tensor_in_two_shards_is_the_one_that_transformers_takes(doubled: Path, make_recipe: Make) -> None:
    (doubled / "model.safetensors").unlink()
    files = json.loads((doubled / "model.safetensors.index.json").read_text())["weight_map"]
    for file in {shard for name, shard in files.items() if shard != files[EMBEDDING]}:
        tensors = load_file(doubled / file)
        save_file({**tensors, EMBEDDING: torch.randn(128, 72)}, doubled / file, {"format": "pt"})
    check_conversion(doubled, make_recipe(doubled, cache_ratio=0.5))


def test_a_single_pickle_wins_over_pickled_shards(doubled: Path, make_recipe: Make) -> None:
    index = json.loads((doubled / "model.safetensors.index.json").read_text())
    for file in doubled.glob("model-*.safetensors"):
        torch.save(load_file(file), doubled / file.with_suffix(".bin").name)
        file.unlink()
    shards = {name: file.replace(".safetensors", ".bin") for name, file in index["weight_map"].items()}
    (doubled / "pytorch_model.bin.index.json").write_text(json.dumps(index | {"weight_map": shards}))
    torch.save(load_file(doubled / "model.safetensors"), doubled / "pytorch_model.bin")
    (doubled / "model.safetensors").unlink()
    (doubled / "model.safetensors.index.json").unlink()
    check_conversion(doubled, make_recipe(doubled, cache_ratio=0.5, allow_pickle=True))


def test_an_index_that_names_a_part_of_the_shards_is_refused(doubled: Path, make_recipe: Make) -> None:
    (doubled / "model.safetensors").unlink()
    index = doubled / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = max(content["weight_map"].values())
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file != last}
    index.write_text(json.dumps(content))
    with pytest.raises(TransmlaError, match=r"tensors are missing, the first is '"):
        open_source(make_recipe(doubled))


def test_weights_of_a_variant_alone_are_refused(make_source: Make, make_recipe: Make) -> None:
    source = make_source(**DEEP)
    (source / "model.safetensors").rename(source / "model.fp16.safetensors")
    with pytest.raises(TransmlaError, match="no weights in"):
        open_source(make_recipe(source))


@pytest.mark.parametrize("bias", ["a file without the biases of the config", "biases that the config does not have"])
def test_biases_in_only_one_of_file_and_config_are_refused(make_source: Make, make_recipe: Make, bias: str) -> None:
    source = make_source(**DEEP, attention_bias=bias.startswith("biases"))
    edit_config(source, attention_bias=not bias.startswith("biases"))
    with pytest.raises(TransmlaError, match=r"self_attn\.[a-z]+_proj\.bias'"):
        open_source(make_recipe(source))
