"""GGUF files are read tensor by tensor and by their headers, and equal what transformers loads as a whole."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_gguf import ARCHITECTURES, write_architecture, write_gguf
from torch import Tensor

from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.export.tokenizer import difference
from transmla.recipe import Recipe
from transmla.source import gguf, gguf_weights
from transmla.source.checkpoint import open_checkpoint
from transmla.source.gguf_header import read_header
from transmla.source.gguf_weights import GgufWeights
from transmla.source.load import load_config, load_model, load_tokenizer
from transmla.source.locate import resolve_source


def whole(file: Path) -> dict[str, Tensor]:
    """The tensors of the model that transformers loads."""
    model = load_model(file, dtype=torch.bfloat16)
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def check_equal(file: Path) -> None:
    weights, expected = GgufWeights(file), whole(file)
    assert list(weights.shapes) == list(expected)
    for name, tensor in expected.items():
        read = weights.read(name)
        assert weights.shapes[name] == tuple(tensor.shape)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_every_tensor_equals_that_of_the_whole_model(
    architecture: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of a few rows, as tensors of a large model are dequantised."""
    monkeypatch.setattr(gguf_weights, "BLOCK", 200)
    write_architecture(tmp_path / "x.gguf", architecture, kind)
    check_equal(tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_0", "Q4_1", "Q5_0"])
def test_every_type_equals_that_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    write_architecture(tmp_path / "x.gguf", "llama", kind)
    check_equal(tmp_path / "x.gguf")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_config_is_that_of_the_whole_file(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    write_architecture(tmp_path / "x.gguf", architecture)
    expected = AutoConfig.from_pretrained(tmp_path, gguf_file="x.gguf")
    expected.return_dict = True
    assert load_config(tmp_path / "x.gguf").to_dict() == expected.to_dict()


def test_a_file_is_opened_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of each type is dequantised, to see that it can be."""
    write_architecture(tmp_path / "x.gguf", "llama")
    rows = []
    dequantise = GgufWeights._dequantise

    def count(self: GgufWeights, tensor: gguf_weights.GgufTensor, first: int, last: int) -> object:
        rows.append(last - first)
        return dequantise(self, tensor, first, last)

    monkeypatch.setattr(GgufWeights, "_dequantise", count)
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert rows == [1, 1]
    assert checkpoint.dtypes["model.norm.weight"] == torch.bfloat16
    assert checkpoint.size == 2 * sum(tensor.numel() for tensor in whole(tmp_path / "x.gguf").values())


def test_a_large_tensor_is_dequantised_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never as a whole in float32, which would take more memory than all else in a conversion."""
    monkeypatch.setattr(gguf_weights, "BLOCK", 64 * 100)
    write_architecture(tmp_path / "x.gguf", "llama", words=20_000)
    weights = GgufWeights(tmp_path / "x.gguf")
    tracemalloc.start()
    weights.read("model.embed_tokens.weight")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000 * 64


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    write_architecture(tmp_path / "x.gguf", "llama")
    content = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[:-2000])
    weights = GgufWeights(tmp_path / "x.gguf")
    with pytest.raises(TransmlaError, match=r"'x.gguf' cannot be read as GGUF; .*it ends inside tensor 'blk.1"):
        [weights.read(name) for name in weights.shapes]


@pytest.mark.parametrize("alignment", [0, 2**32 - 1])
def test_an_impossible_alignment_is_refused(alignment: int, tmp_path: Path) -> None:
    """The copy of the header for transformers would be as large as the alignment."""
    name = b"general.alignment"
    field = struct.pack("<Q", len(name)) + name + struct.pack("<II", 4, alignment)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    with pytest.raises(ValueError, match=f"its tensors are aligned to {alignment} bytes"):
        read_header(tmp_path / "x.gguf")


def test_a_tensor_that_transformers_does_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "llama", (16, {}, {"attn_q.bias": (64,)}))
    write_architecture(tmp_path / "x.gguf", "llama")
    with pytest.raises(TransmlaError, match=r"'x.gguf' holds the tensor 'blk.0.attn_q.bias'; .* dropped silently"):
        GgufWeights(tmp_path / "x.gguf")


def test_experts_that_lack_a_part_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    width, fields, shapes = ARCHITECTURES["qwen3moe"]
    shapes = {name: shape for name, shape in shapes.items() if "up_exps" not in name}
    monkeypatch.setitem(ARCHITECTURES, "qwen3moe", (width, fields, shapes))
    write_architecture(tmp_path / "x.gguf", "qwen3moe")
    names = set(GgufWeights(tmp_path / "x.gguf").shapes)
    assert "model.layers.0.mlp.experts.down_proj" in names
    assert "model.layers.0.mlp.experts.gate_up_proj" not in names


def test_the_tiny_file_of_the_other_tests_is_equal_too(tmp_path: Path) -> None:
    write_gguf(tmp_path)
    check_equal(tmp_path / "model.gguf")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_file_that_is_not_unpacked_is_converted_as_one_that_is(
    architecture: str,
    tmp_path: Path,
    make_recipe: Callable[..., Recipe],
    assets: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_architecture(tmp_path / "x.gguf", architecture)
    letters = tmp_path / "letters.txt"
    letters.write_text("a b c d e f g h i j " * 200)
    settings = {"format": "transmla", "cache_ratio": 0.75, "calibration": {"source": str(letters)}}
    unpacked = convert(make_recipe(tmp_path / "x.gguf", output="unpacked", **settings))
    monkeypatch.setattr(gguf, "LARGEST", 1)
    packed = convert(make_recipe(tmp_path / "x.gguf", output="packed", **settings))
    for file in unpacked.glob("*.safetensors"):
        assert (packed / file.name).read_bytes() == file.read_bytes(), file.name
    assert difference(load_tokenizer(packed), load_tokenizer(unpacked)) == ""


def test_the_tokenizer_of_a_file_is_that_of_its_unpacked_folder(tmp_path: Path, assets: Path) -> None:
    """Qwen's class adds a normalizer when it is loaded from a folder."""
    write_architecture(tmp_path / "x.gguf", "qwen2")
    folder = resolve_source(str(tmp_path / "x.gguf"))
    assert folder.is_dir()
    assert difference(load_tokenizer(tmp_path / "x.gguf"), load_tokenizer(folder)) == ""
