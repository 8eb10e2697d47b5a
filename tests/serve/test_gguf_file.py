"""GGUF files of a tiny export: fields, tensors, the exact rescaling, refusals, and no file after a failure."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from gguf import GGUFReader, quants
from helpers.native_exports import HEADS, LAYERS, SHAPE, native_export
from torch import Tensor
from transformers import AutoModelForCausalLM

from transmla.errors import TransmlaError
from transmla.serve import gguf_check, gguf_file
from transmla.serve.gguf_check import check_file
from transmla.serve.gguf_file import check_config, write_gguf
from transmla.serve.gguf_scale import EMBEDDING, NORM, READERS, ROW_SIZE, Scales, choose_scales, latent_rows
from transmla.serve.gguf_tensors import tensor_type
from transmla.source.checkpoint import open_checkpoint
from transmla.source.load import load_tokenizer

RUNS = importlib.util.find_spec("xllamacpp") is not None


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_export(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with compressed queries."""
    return native_export(tmp_path_factory.mktemp("gguf"), q_lora_rank=96)


def scales_of(folder: Path) -> Scales:
    checkpoint = open_checkpoint(folder)
    return choose_scales(LAYERS, config_of(folder)["kv_lora_rank"], set(checkpoint.shapes), checkpoint.read)


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def write(folder: Path, file: Path, file_type: str) -> GGUFReader:
    write_gguf(folder, file, file_type, check=False)
    return GGUFReader(file)


def values(reader: GGUFReader) -> dict[str, Tensor]:
    found = {t.name: (quants.dequantize(t.data, t.tensor_type), t.shape) for t in reader.tensors}
    return {
        name: torch.from_numpy(numpy.array(data)).view(*reversed(shape.tolist()))
        for name, (data, shape) in found.items()
    }


def test_fields_are_those_of_the_export(export: Path, tmp_path: Path) -> None:
    reader, config = write(export, tmp_path / "x.gguf", "q8_0"), config_of(export)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    rank, d_n, d_r = (config[name] for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"))
    expected = {
        "general.architecture": "deepseek2",
        "general.file_type": 7,
        "deepseek2.block_count": LAYERS,
        "deepseek2.leading_dense_block_count": LAYERS,
        "deepseek2.context_length": config["max_position_embeddings"],
        "deepseek2.embedding_length": 256,
        "deepseek2.feed_forward_length": 512,
        "deepseek2.vocab_size": config["vocab_size"],
        "deepseek2.attention.head_count": HEADS,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.q_lora_rank": 0,
        "deepseek2.attention.kv_lora_rank": rank,
        "deepseek2.attention.key_length": rank + d_r,
        "deepseek2.attention.value_length": rank,
        "deepseek2.attention.key_length_mla": d_n + d_r,
        "deepseek2.attention.value_length_mla": config["v_head_dim"],
        "deepseek2.rope.dimension_count": d_r,
        "deepseek2.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: fields[name] for name in expected} == expected
    eps = fields["deepseek2.attention.layer_norm_rms_epsilon"]
    assert eps == float(numpy.float32(1e-6)) * 4.0 ** scales_of(export).residual
    tokenizer = load_tokenizer(export)
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == config["vocab_size"]
    assert {token: tokens[index] for token, index in tokenizer.get_vocab().items() if tokens[index] != token} == {}


@pytest.mark.parametrize("name", ["export", "compressed"])
def test_the_float32_file_holds_the_rescaled_export(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    config, found = config_of(folder), values(write(folder, tmp_path / "x.gguf", "f32"))
    scales, checkpoint = scales_of(folder), open_checkpoint(folder)
    heads, rank, d_n, d_v = HEADS, config["kv_lora_rank"], config["qk_nope_head_dim"], config["v_head_dim"]
    names = {"attn_norm": NORM, "attn_output": "self_attn.o_proj.weight", "ffn_norm": "post_attention_layernorm.weight"}
    names |= {"attn_kv_a_mqa": READERS[2], "attn_kv_a_norm": "self_attn.kv_a_layernorm.weight"}
    names |= {f"ffn_{part}": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    queries = ("q_a", "q_b") if config["q_lora_rank"] else ("q",)
    names |= {f"attn_{part}": f"self_attn.{part}_proj.weight" for part in queries}
    if config["q_lora_rank"]:
        names["attn_q_a_norm"] = "self_attn.q_a_layernorm.weight"
    expected = {
        "token_embd.weight": EMBEDDING,
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for i in range(LAYERS):
        expected |= {f"blk.{i}.{ours}.weight": f"model.layers.{i}.{theirs}" for ours, theirs in names.items()}
        expand = checkpoint.read(f"model.layers.{i}.self_attn.kv_b_proj.weight").view(heads, d_n + d_v, rank)
        assert torch.equal(found.pop(f"blk.{i}.attn_k_b.weight"), expand[:, :d_n].mT)
        assert torch.equal(found.pop(f"blk.{i}.attn_v_b.weight"), expand[:, d_n:])
    assert set(found) == set(expected)
    for ours, theirs in expected.items():
        tensor = checkpoint.read(theirs)
        assert torch.equal(found[ours], scales.apply(theirs, tensor)), ours
        # A power of two leaves every significand.
        assert torch.equal(torch.frexp(found[ours]).mantissa, torch.frexp(tensor).mantissa), ours


@pytest.mark.parametrize("name", ["export", "compressed"])
@torch.no_grad()
def test_the_rescaled_model_has_the_same_logits(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    scales = scales_of(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.arange(40)[None]
    before = model(tokens).logits
    for tensor, parameter in model.named_parameters():
        parameter.copy_(scales.apply(tensor, parameter))
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = scales.eps(module.variance_epsilon)
    assert scales.residual > 0
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-5, atol=1e-5)


def test_latent_rows_get_an_ordinary_size(export: Path) -> None:
    checkpoint, scales = open_checkpoint(export), scales_of(export)
    sizes = []
    for i in range(LAYERS):
        name = f"model.layers.{i}.{READERS[2]}"
        # The latents themselves are tiny.
        inputs = checkpoint.read(f"model.layers.{i}.{NORM}").abs().max()
        assert float(checkpoint.read(name)[: scales.rank].abs().max() * inputs) < 1e-4
        sizes.append(float(scales.apply(name, checkpoint.read(name))[: scales.rank].square().mean().sqrt()))
    assert ROW_SIZE <= min(sizes) <= 2 * ROW_SIZE
    assert latent_rows("mlp.up_proj.weight", torch.ones(4, 4), 2).tolist() == []


@pytest.mark.parametrize("move", [-3, 14])
def test_an_export_with_moved_norms_gives_the_same_tensors(export: Path, move: int) -> None:
    checkpoint = open_checkpoint(export)

    def read(name: str) -> Tensor:
        tensor = checkpoint.read(name)
        if name.endswith(NORM):
            return tensor * 2.0**-move
        return tensor * 2.0**move if name.endswith(READERS) else tensor

    scales = scales_of(export)
    moved = choose_scales(LAYERS, scales.rank, set(checkpoint.shapes), read)
    assert moved.norms != scales.norms
    for name in checkpoint.shapes:
        assert torch.equal(moved.apply(name, read(name)), scales.apply(name, checkpoint.read(name))), name


@pytest.mark.parametrize("file_type", ["bf16", "f16", "q8_0", "q4_k_m"])
def test_other_types_are_close(export: Path, tmp_path: Path, file_type: str) -> None:
    exact = values(write(export, tmp_path / "exact.gguf", "f32"))
    reader = write(export, tmp_path / "x.gguf", file_type)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    limit = {"bf16": 3e-3, "f16": 3e-3, "q8_0": 8e-3, "q4_k_m": 0.1}[file_type]
    for name, found in values(reader).items():
        assert kinds[name] == "F32" or exact[name].dim() > 1
        assert float((found - exact[name]).norm() / exact[name].norm()) < limit, name
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".gguf"]


def test_types_of_a_q4_k_m_file() -> None:
    def kind(name: str, width: int = 512, layer: int = 0) -> str:
        return tensor_type(name, (8, width), "q4_k_m", layer, 16)

    assert [kind("output.weight"), kind("output.weight", 192), kind("output.weight", 200)] == ["Q6_K", "Q8_0", "F16"]
    assert [kind("token_embd.weight"), kind("blk.0.attn_q.weight", 64)] == ["Q4_K", "Q5_0"]
    assert [kind("blk.0.ffn_down.weight", layer=i) for i in (0, 2, 3, 4, 14, 15)] == [
        *("Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K", "Q6_K")
    ]
    assert [kind("blk.0.attn_kv_a_mqa.weight"), kind("blk.0.ffn_up.weight")] == ["Q8_0", "Q4_K"]
    assert tensor_type("blk.0.attn_norm.weight", (512,), "q4_k_m", 0, 16) == "F32"


def refused(folder: Path, file: Path, says: str, file_type: str = "q8_0", *, check: bool = False) -> None:
    before = sorted(path.name for path in file.parent.iterdir())
    with pytest.raises(TransmlaError, match=says):
        write_gguf(folder, file, file_type, check=check)
    assert sorted(path.name for path in file.parent.iterdir()) == before


def test_requests_are_refused_first(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "load_tokenizer", lambda _: pytest.fail("expensive work before the refusal"))
    (tmp_path / "there.gguf").touch()
    refused(export, tmp_path / "there.gguf", "exists; nothing is overwritten")
    refused(export, tmp_path / "x.gguf", "unknown type 'q2'", "q2")
    with pytest.raises(TransmlaError, match="there is no folder"):
        write_gguf(export, tmp_path / "nowhere" / "x.gguf", "f32")
    refused(export.parent / "source", tmp_path / "x.gguf", "holds no finished conversion")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    refused(export, tmp_path / "x.gguf", r"needs the 'gguf' package.*pip install \"gguf>=0.17\"")


def test_the_transmla_format_is_refused(tmp_path: Path) -> None:
    folder = native_export(tmp_path, format="transmla")
    refused(folder, tmp_path / "x.gguf", "in the transmla format.*--format native")


def test_what_the_native_format_cannot_store_is_named(tmp_path: Path) -> None:
    refused(
        native_export(tmp_path, family="qwen2", format="transmla"),
        tmp_path / "x.gguf",
        "DeepSeek's layout only, without biases",
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type 'llama3'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"q_lora_rank": 64, "num_hidden_layers": 27}, "compressed queries in 27 layers"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(export: Path, changes: dict[str, Any], says: str) -> None:
    check_config(config_of(export))
    with pytest.raises(TransmlaError, match=says):
        check_config(config_of(export) | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_lora_rank": None}, "kv_lora_rank is missing or has the wrong type"),
        ({"rope_parameters": None}, "rope_parameters is missing or has the wrong type"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_theta is missing"),
        ({"num_hidden_layers": LAYERS + 1}, f"'model.layers.{LAYERS}.input_layernorm.weight' is missing"),
        ({"num_attention_heads": HEADS + 1}, "has shape .*; config.json asks for shape"),
        ({"q_lora_rank": 8}, "llama.cpp's layout has no place for 'model.layers.0.self_attn.q_proj.weight'"),
    ],
)
def test_a_config_that_does_not_describe_the_tensors_is_refused(
    export: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    folder = shutil.copytree(export, tmp_path / "export")
    (folder / "config.json").write_text(json.dumps(config_of(export) | changes))
    refused(folder, tmp_path / "x.gguf", says)


def test_damaged_files_are_refused(export: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(export, tmp_path / "export")
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    refused(folder, tmp_path / "x.gguf", "eos_token_id is no number")
    (folder / "config.json").write_text("{")
    refused(folder, tmp_path / "x.gguf", "is not a valid JSON file")


def test_a_full_disk_is_refused(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(export, tmp_path / "x.gguf", "GB free; the file needs")


def test_too_large_values_are_refused(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scales, "apply", lambda self, name, tensor: tensor.float() * 1e9)
    refused(export, tmp_path / "x.gguf", "holds values up to .*--type bf16")
    write_gguf(export, tmp_path / "y.gguf", "bf16", check=False)


def test_a_failure_leaves_no_file(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "refuse_check", lambda _: "")
    monkeypatch.setattr(gguf_check, "run_file", lambda *_: {"text": [], "best": [], "log_probs": []})
    refused(export, tmp_path / "x.gguf", "splits a text into other tokens", check=True)
    monkeypatch.setattr(gguf_file, "quantise", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_gguf(export, tmp_path / "x.gguf", "f32", check=False)
    assert list(tmp_path.iterdir()) == []


def test_other_log_probs_are_refused(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(export)

    def run(file: Path, request: dict[str, Any]) -> dict[str, Any]:
        text = tokenizer(request["text"])["input_ids"]
        return {"text": text, "best": request["chosen"], "log_probs": [-20.0] * len(request["chosen"])}

    monkeypatch.setattr(gguf_check, "run_file", run)
    with pytest.raises(TransmlaError, match=r"differ by .* on average, 0.3 allowed"):
        check_file(export, Path("x.gguf"), tokenizer, "q8_0", gguf_file.Silent())


def test_without_llama_cpp_the_file_is_not_run(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else found(name))
    written = write_gguf(export, tmp_path / "x.gguf", "f32")
    assert written.check is None
    assert "pip install xllamacpp" in written.unchecked
    assert written.size == (tmp_path / "x.gguf").stat().st_size


@pytest.mark.skipif(not RUNS, reason="xllamacpp is not installed")
@pytest.mark.parametrize("name", ["export", "compressed"])
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    written = write_gguf(request.getfixturevalue(name), tmp_path / "x.gguf", "f32")
    assert written.check is not None
    assert written.check.equal == written.check.tokens
    assert written.check.largest < 2e-3
    assert SHAPE["num_hidden_layers"] == LAYERS


@pytest.mark.skipif(not RUNS, reason="xllamacpp is not installed")
def test_a_file_that_llama_cpp_cannot_load_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(TransmlaError, match=r"llama.cpp cannot run the file"):
        gguf_check.run_file(tmp_path / "x.gguf", {"text": "a", "prompt": [0], "chosen": [1], "candidates": 3})
