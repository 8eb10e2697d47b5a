"""A format is one file: a new file in the formats folder can plan, convert and write a model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import transmla.formats
from transmla.convert.pipeline import convert
from transmla.convert.prepare import prepare, summarise
from transmla.errors import TransmlaError
from transmla.export.manifest import Manifest
from transmla.recipe import Recipe
from transmla.registry import scan

TOY = '''
"""A format that writes factors under their own names."""

from transmla.export.card import CardWords
from transmla.formats.base import AttentionExport, Format
from transmla.formats.runtimes import Runtime


class Toy(Format):
    name = "toy"
    summary = "factors as they are"
    preference = -1

    def lacks(self, spec, kept):
        return "q/k norms" if spec.normed else None

    def rotary(self, spec, kind, width, *, custom):
        return tuple(range(0, kind.rotary_pairs, 2 * kind.rotary_pairs // width)), {"rope_type": "toy"}

    def runtimes(self, plan):
        return [Runtime("toybox", True, "reads nothing else")]

    def target(self, spec):
        return "a toy"

    def config(self, source, plan):
        return {"model_type": "toy", "rank": plan.shape.kv_lora_rank}

    def attention(self, factors, plan, view, inputs):
        names = ("q_nope", "q_pe", "latent", "rope", "k_up", "v_up", "o", "inv_freq")
        tensors = {name: getattr(factors, name).float().contiguous() for name in names}
        return AttentionExport(tensors, factors.to(tensors["o"].dtype), {"toys": 1.0})

    def card_words(self, spec):
        return CardWords(layout="It is a toy.", tags=("toy",))

    def checks(self, model, tokens, dtype):
        yield from ()


FORMAT = Toy()
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Add the toy format's file to the formats folder."""
    folder = tmp_path / "formats"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(transmla.formats, "__path__", [*transmla.formats.__path__, str(folder)])
    scan.cache_clear()
    yield
    scan.cache_clear()


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("reconstruct", ["off", "fast"])
def test_a_new_format_needs_one_file(
    reconstruct: str, make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    source = make_source(num_hidden_layers=3)
    recipe = make_recipe(source, format="toy", cache_ratio=0.5, reconstruct=reconstruct)
    plan = summarise(prepare(recipe))
    assert plan["target"] == "a toy"
    assert [runtime["name"] for runtime in plan["runtimes"]] == ["toybox"]
    folder = convert(recipe)
    manifest = Manifest.read(folder)
    assert manifest.format == "toy"
    assert [layer["toys"] for layer in manifest.layers] == [1.0] * 3
    shape = manifest.plan.shape
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "toy", "rank": shape.kv_lora_rank}
    assert "It is a toy." in (folder / "README.md").read_text()
    # The toy format inherits ``last_tensors``: every source tensor outside the attention is copied bit for bit.
    written = {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}
    original = load_file(source / "model.safetensors")
    untouched = {name for name in original if ".self_attn." not in name}
    assert all(torch.equal(written[name], original[name]) for name in untouched)
    assert written["model.layers.2.self_attn.latent"].shape == (shape.latent_rank, manifest.plan.spec.hidden_size)


@pytest.mark.usefixtures("toy")
def test_a_new_format_refuses_what_it_cannot_store(
    make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(TransmlaError, match="the toy format cannot store q/k norms"):
        prepare(make_recipe(make_source("qwen3", name="normed"), format="toy"))
    with pytest.raises(TransmlaError, match="--pad-for needs the native or transmla format"):
        prepare(make_recipe(make_source(name="plain"), format="toy", pad_for="vllm"))


def test_an_unknown_format_is_refused_with_the_known_ones(
    make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(TransmlaError, match=r"unknown format 'toy'; supported: native, transmla"):
        prepare(make_recipe(make_source(), format="toy"))
