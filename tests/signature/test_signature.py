"""Signatures: exact where they must be, equal under other conditions, and different after the smallest fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_recipe, save_source, write_text
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from transmla.convert.pipeline import convert
from transmla.core.exact_float64 import ExactFloat64
from transmla.evaluate.verify import verify
from transmla.export.hashes import file_sha256
from transmla.export.manifest import Manifest
from transmla.modeling.registration import register
from transmla.signature.compare import TOLERANCE, compare_layers, differences
from transmla.signature.layers import LayerProjections
from transmla.signature.probe import UNSETTLED, Projections, project, project_logits, tokens
from transmla.signature.sign import Measured, measure_export
from transmla.signature.tokenizer import describe_tokenizer
from transmla.source.load import load_tokenizer

WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
# Family → (changes of its config, dtype). Each has three layers.
FAMILIES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "llama": ({"num_attention_heads": 4, "num_key_value_heads": 2}, torch.bfloat16),
    "gemma2": ({"layer_types": WINDOWS}, torch.float32),
    "qwen3_moe": ({}, torch.bfloat16),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a ``source`` and its export ``out``, by family."""
    folders = {}
    for family, (changes, dtype) in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        save_source(folder / "source", family, num_hidden_layers=3, dtype=dtype, **changes)
        text = write_text(folder / "text.txt")
        convert(build_recipe(folder / "source", folder / "out", text, cache_ratio=0.5))
        folders[family] = folder
    return folders


@pytest.fixture
def copied(exports: dict[str, Path], tmp_path: Path) -> Path:
    """The folder of llama's source and export, copied for this test."""
    return Path(shutil.copytree(exports["llama"], tmp_path / "llama"))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "transmla.json").read_text())
    change(manifest)
    (folder / "transmla.json").write_text(json.dumps(manifest))


def failures(folder: Path, **options: Any) -> dict[str, str]:
    return {check.name: check.detail for check in verify(folder / "out", **options) if not check.passed}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_run_one_by_one_are_the_whole_model(exports: dict[str, Path], family: str) -> None:
    folder = exports[family] / "out"
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    model.config._experts_implementation = "eager"
    with torch.no_grad(), ExactFloat64():
        logits = model(tokens(model.config.vocab_size)).logits
    found = measure_export(folder, family, "cpu").rest.logits
    assert max(found.deviations(project_logits(logits[0]).values)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_signature_records_how_much_bfloat16_changes_the_logits(exports: dict[str, Path], family: str) -> None:
    folder = exports[family] / "out"
    register()
    logits = []
    for dtype in (torch.float64, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        model.config._experts_implementation = "eager"
        with torch.no_grad():
            logits.append(model(tokens(model.config.vocab_size)).logits[0, UNSETTLED:].double())
    change = (logits[1] - logits[0]).norm() / logits[0].norm()
    signature = Manifest.read(folder).signature
    assert signature is not None
    assert 0 < change / 2 < max(signature.rounding) < 4 * change


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_an_export_passes_under_other_conditions(
    exports: dict[str, Path], family: str, threads: Callable[[int], None]
) -> None:
    folder = exports[family]
    threads(3)
    assert failures(folder, source=str(folder / "source"), dtype=torch.bfloat16) == {}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_float32_rounds_far_less_than_the_tolerance(
    exports: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exports[family] / "out"
    signature = Manifest.read(folder).signature
    assert signature is not None
    monkeypatch.setattr("transmla.signature.layers.precision", lambda _: torch.float32)
    rounded = measure_export(folder, family, "cpu")
    assert compare_layers(signature, rounded, experts=False).passed
    pairs = zip(rounded.layers, signature.layers, strict=True)
    deviations = [d for now, then in pairs for d in now.attention.deviations(then.attention)]
    assert max(deviations) < TOLERANCE / 5


def test_a_slight_change_of_one_head_names_its_layer(copied: Path) -> None:
    index = json.loads((copied / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    file = copied / "out" / index[name]
    content = load_file(file)
    content[name][:8] = content[name][:8] * 1.02
    save_file(content, file, metadata={"format": "pt"})
    edit_manifest(copied / "out", lambda m: m["hashes"].update({file.name: file_sha256(file)}))
    failed = failures(copied)
    assert "the attention of layer 1" in failed["layers as signed"]
    assert "layer 0" not in failed["layers as signed"]
    assert set(failures(copied, source=str(copied / "source"))) >= {
        "layers as signed",
        "distance to the source as signed",
    }


def test_an_export_without_a_signature_says_so_and_passes(copied: Path) -> None:
    edit_manifest(copied / "out", lambda m: m.pop("signature"))
    checks = list(verify(copied / "out", source=str(copied / "source")))
    assert all(check.passed for check in checks)
    assert [check.detail for check in checks if check.name == "signature"] == [
        "none: an older version wrote this export, so its layers are not compared"
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["layers"].pop(),
        lambda s: s["layers"][1].update(attention=[]),
        lambda s: s["layers"][1].update(change=[float("nan")] * 4),
        lambda s: s.update(head=[1e300] * 4),
        lambda s: s.update(embedding=[]),
        lambda s: s.update(logits=[0.0] * 4),
        lambda s: s.pop("rounding"),
        lambda s: s["config"].pop("hidden_act"),
        lambda s: s["tokenizer"].clear(),
        lambda s: s.update(healings=1),
    ],
)
def test_another_signature_is_a_failed_check(copied: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_manifest(copied / "out", lambda m: change(m["signature"]))
    failed = next(check for check in verify(copied / "out") if not check.passed)
    assert failed.name.endswith("as signed")


def test_another_source_fails_even_if_the_fingerprint_was_edited(copied: Path) -> None:
    other = copied / "other"
    save_source(other, "llama", num_hidden_layers=3, dtype=torch.bfloat16, num_attention_heads=4, num_key_value_heads=2)
    content = load_file(other / "model.safetensors")
    for name, tensor in content.items():
        content[name] = tensor * 1.02 if "v_proj" in name else tensor
    save_file(content, other / "model.safetensors", metadata={"format": "pt"})
    assert set(failures(copied, source=str(other))) >= {"source", "source layers as signed"}
    from transmla.source.checkpoint import open_checkpoint

    fingerprint = open_checkpoint(other).fingerprint()
    edit_manifest(copied / "out", lambda m: m["source"].update(fingerprint=fingerprint))
    failed = failures(copied, source=str(other))
    assert set(failed) == {"source layers as signed", "distance to the source as signed"}


def test_a_router_may_change_one_group_of_tokens_and_attention_none(exports: dict[str, Path]) -> None:
    folder = exports["qwen3_moe"] / "out"
    signature = Manifest.read(folder).signature
    assert signature is not None
    exact = measure_export(folder, "qwen3_moe", "cpu")
    layer = exact.layers[1]

    def moved(projections: Projections, groups: int) -> Projections:
        moves = [size * (i < groups) for i, size in enumerate(projections.sizes)]
        return Projections([v + m for v, m in zip(projections.values, moves, strict=True)], projections.sizes)

    for groups, attention, passed in ((1, False, True), (2, False, False), (1, True, False)):
        changed = (
            LayerProjections(moved(layer.attention, groups), layer.change)
            if attention
            else LayerProjections(layer.attention, moved(layer.change, groups))
        )
        measured = Measured([exact.layers[0], changed, *exact.layers[2:]], exact.rest)
        assert compare_layers(signature, measured, experts=True).passed == passed


def test_rows_of_other_order_or_size_have_other_projections() -> None:
    rows = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    recorded = project(rows).rounded()
    assert max(project(rows).deviations(recorded)) < 1e-8
    swapped = rows[[1, 0, *range(2, 64)]]
    for other in (swapped, rows.roll(4, 0), rows.roll(1, 1), rows * 1.001, -rows, rows * 0):
        assert max(project(other).deviations(recorded)) > 1e-4


def test_what_a_tokenizer_does_is_described(copied: Path) -> None:
    tokenizer = load_tokenizer(copied / "source")
    described = describe_tokenizer(tokenizer)
    assert described == describe_tokenizer(load_tokenizer(copied / "out"))
    tokenizer.chat_template = "{{ 'other' }}"
    assert [k for k, v in describe_tokenizer(tokenizer).items() if v != described[k]] == ["templates"]
    tokenizer = load_tokenizer(copied / "source")
    tokenizer.padding_side = "left" if tokenizer.padding_side == "right" else "right"
    assert [k for k, v in describe_tokenizer(tokenizer).items() if v != described[k]] == ["settings"]
    tokenizer = load_tokenizer(copied / "source")
    tokenizer.add_tokens(["wug"])
    assert describe_tokenizer(tokenizer)["vocabulary"] != described["vocabulary"]


def test_differences_name_their_places() -> None:
    recorded = {"a": {"b": [1, 2.0, "x"]}, "c": None, "d": True}
    found = {"a": {"b": [1, 2.0000001, "y"]}, "d": 1, "e": 0}
    assert differences(recorded, recorded) == []
    wrong = ["a.b.2 is 'y', not 'x'", "c is missing", "d is 1, not True", "e was added"]
    assert differences(recorded, found, close=1e-6) == wrong
    assert differences([1, 2], [1]) == ["is [1], not [1, 2]"]
    assert differences({"n": float("nan")}, {"n": 1.0}) == ["n is 1.0, not nan"]
