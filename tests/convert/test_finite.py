"""Numbers that overflow are refused by layer, before a shard is written from them, in every format."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from transmla.convert.inspect import inspect_source
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.files import json_text, write_json
from transmla.recipe import Recipe
from transmla.reporter import Silent

Change = Callable[[str, torch.Tensor], torch.Tensor]
SHARD = re.compile(r"model-\d{5}")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the folder of a source of three layers of the given family, made once."""
    from conftest import save_source

    made: dict[str, Path] = {}

    def source(family: str) -> Path:
        if family not in made:
            kind = {"layer_types": None} if family == "gemma2" else {}
            made[family] = save_source(tmp_path_factory.mktemp(family) / "s", family, num_hidden_layers=3, **kind)
        return made[family]

    return source


def changed(source: Path, folder: Path, change: Change) -> Path:
    """Copy ``source`` into ``folder`` with ``change`` applied to every tensor."""
    shutil.copytree(source, folder)
    tensors = {name: change(name, t).contiguous() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def times(part: str, factor: float) -> Change:
    return lambda name, t: t * factor if part in name else t


def filled(part: str, value: float) -> Change:
    return lambda name, t: torch.full_like(t, value) if part in name else t


CASES = [
    ("llama", times("embed", 1e30), "the embedding", {}),
    ("llama", times("layers.1.self_attn.v_proj", 1e25), "layer 1", {}),
    ("llama", filled("layers.2.self_attn.q_proj", 1e38), "layer 2", {}),
    ("llama", times("layers.2.mlp.down_proj", 1e30), "layer 2", {"format": "transmla"}),
    ("llama", times("layers.0.self_attn.o_proj", 1e30), "layer 0", {"format": "transmla"}),
    ("llama", times("layers.1.self_attn.o_proj", 1e30), "layer 1", {"format": "transmla", "layers": "0,2"}),
    ("qwen3", times("layers.1.self_attn.q_proj", 1e25), "layer 1", {}),
    ("gemma2", times("layers.1.mlp.up_proj", 1e30), "layer 1", {}),
    ("llama", times("layers.1.self_attn.v_proj", 1e25), "layer 1", {"method": "transmla"}),
    ("llama", times("layers.1.self_attn.v_proj", 1e25), "layer 1", {"reconstruct": "fast"}),
    ("llama", filled("lm_head", 3.4e38), "the model's end", {"dtype": "bfloat16"}),
    ("llama", filled("model.norm.weight", 3.4e38), "the model's end", {"dtype": "bfloat16"}),
    ("llama", filled("embed_tokens.weight", 3.4e38), "the embedding", {"dtype": "bfloat16"}),
    ("llama", filled("layers.1.input_layernorm", 3.4e38), "layer 1", {"dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("family", "change", "place", "settings"), CASES)
def test_what_overflows_is_refused_by_layer_before_its_shard(
    family: str,
    change: Change,
    place: str,
    settings: dict[str, Any],
    sources: Callable[[str], Path],
    tmp_path: Path,
    make_recipe: Callable[..., Recipe],
) -> None:
    source = changed(sources(family), tmp_path / "source", change)
    with pytest.raises(TransmlaError) as refused:
        convert(make_recipe(source, cache_ratio=0.5, **settings))
    assert refused.value.what.startswith(f"{place}: ")
    assert refused.value.limit
    assert refused.value.remedy
    written = {file.name for file in (tmp_path / "out.partial").iterdir() if SHARD.match(file.name)}
    finished = int(place.removeprefix("layer ")) + 1 if place.startswith("layer") else 0
    assert len(written) == finished  # the embedding, and the layers before this one


def test_inspect_refuses_by_layer_too(
    sources: Callable[[str], Path], tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    source = changed(sources("llama"), tmp_path / "source", filled("layers.1.self_attn.q_proj", 1e38))
    with pytest.raises(TransmlaError, match=r"^layer 1: "):
        inspect_source(make_recipe(source), Silent())


def test_a_layer_of_zeros_is_no_overflow(
    sources: Callable[[str], Path], tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    source = changed(sources("llama"), tmp_path / "source", times("layers.1.self_attn", 0.0))
    convert(make_recipe(source))
    json.dumps(inspect_source(make_recipe(source), Silent()).to_dict(), allow_nan=False)


def test_samples_of_a_model_that_overflows_are_refused(
    sources: Callable[[str], Path], tmp_path: Path, make_recipe: Callable[..., Recipe], assets: Path
) -> None:
    source = changed(sources("llama"), tmp_path / "source", filled("layers.1.self_attn.q_proj", 1e38))
    with pytest.raises(TransmlaError, match="logits are NaN or infinite"):
        convert(make_recipe(source, calibration={"source": "self"}))
    assert not (tmp_path / "out.partial").exists()


def test_no_json_holds_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"error": float("nan")})
    assert not any(tmp_path.iterdir())
    assert json.loads(json_text({"a": [float("inf"), 1.0], "b": (float("nan"),)})) == {"a": [None, 1.0], "b": [None]}
