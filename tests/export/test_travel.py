"""Exports that other software saves again, fine-tuned or not, are verified, healed and pushed like others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import Run
from transformers import AutoModelForCausalLM, AutoTokenizer

import transmla
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.evaluate.verify import verify
from transmla.export import push as hub
from transmla.export.manifest import Manifest
from transmla.formats.native_layout import INPUT_SCALE
from transmla.heal.run import heal
from transmla.heal.settings import Healing
from transmla.recipe import Recipe

TOKENS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source of three layers, and its exports in both formats."""
    from conftest import build_recipe, save_source, write_text

    folder = tmp_path_factory.mktemp("exports")
    source, text = save_source(folder / "source", num_hidden_layers=3), write_text(folder / "text.txt")
    settings = {"cache_ratio": 0.5}
    return {"source": source, "text": text} | {
        form: convert(build_recipe(source, folder / form, text, format=form, **settings))
        for form in ("native", "transmla")
    }


def save(model: Any, export: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(export).save_pretrained(folder)
    return folder


def verified(folder: Path, **settings: Any) -> None:
    failed = [check for check in verify(folder, **settings) if not check.passed]
    assert not failed


def train(model: Any, rate: float = 1e-3) -> None:
    """Take three steps of Adam on all weights that have gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate)
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return transmla.load(folder, dtype=torch.float32)(TOKENS).logits


@pytest.mark.parametrize("form", ["native", "transmla"])
@pytest.mark.parametrize("loader", [transmla.load, AutoModelForCausalLM.from_pretrained])
def test_an_export_that_is_saved_again_is_as_before(
    form: str, loader: Callable[[Path], Any], exports: dict[str, Path], tmp_path: Path
) -> None:
    folder = save(loader(exports[form]), exports[form], tmp_path / "again")
    assert not (folder / "transmla.json").exists()
    verified(folder, source=str(exports["source"]))
    manifest, original = Manifest.read(folder), Manifest.read(exports[form])
    assert (manifest.resaved, manifest.weights_changed) == (True, False)
    assert (manifest.plan, manifest.layers, manifest.source) == (original.plan, original.layers, original.source)
    assert "with the same weights" in (folder / "README.md").read_text()
    assert hub.push(folder, "org/name", dry_run=True).files
    assert torch.equal(logits(folder), logits(exports[form]))


@pytest.mark.parametrize("form", ["native", "transmla"])
def test_a_fine_tuned_export_says_so_and_heals(form: str, exports: dict[str, Path], tmp_path: Path) -> None:
    model = transmla.load(exports[form], dtype=torch.float32)
    train(model)
    folder = save(model, exports[form], tmp_path / "tuned")
    expected = logits(folder)
    assert not torch.equal(expected, logits(exports[form]))
    verified(folder, source=str(exports["source"]))
    assert Manifest.read(folder).weights_changed
    assert "Other software has changed the weights since" in (folder / "README.md").read_text()
    assert hub.push(folder, "org/name", dry_run=True).files
    shutil.rmtree(tmp_path / "tuned")
    save(model, exports[form], folder)  # not verified before it is healed
    healed = heal(settings(folder, exports, tmp_path / "healed"))
    manifest = Manifest.read(healed)
    assert manifest.weights_changed
    kl = manifest.healing[-1]["held_out_kl"]
    assert kl["after"] <= kl["before"]
    verified(healed)
    again = save(transmla.load(healed), healed, tmp_path / "again")
    verified(again)
    assert len(Manifest.read(again).healing) == 1


def test_every_verb_takes_an_export_that_is_saved_again(exports: dict[str, Path], tmp_path: Path, run: Run) -> None:
    folder, source = save(transmla.load(exports["native"]), exports["native"], tmp_path / "again"), exports["source"]
    push = ("push", str(folder), "org/name", "--dry-run")
    code, _, error = run(*push)
    assert code == 2
    assert "is not verified" in error
    assert f"run `transmla verify {folder}`" in error
    sizes = ("--length", "32", "--batch", "8", "--held-out", "4", "--max-tokens", "1024")
    named = ("--teacher", str(source), "-o", str(tmp_path / "healed"), "--data", str(exports["text"]))
    assert run("heal", str(folder), *named, *sizes)[0] == 0
    assert run("gguf", str(folder), "-o", str(tmp_path / "f.gguf"), "--type", "f32", "--no-check")[0] == 0
    assert run("verify", str(folder))[0] == 0
    assert run(*push)[0] == 0


def settings(student: Path, exports: dict[str, Path], output: Path) -> Healing:
    values = {"length": 32, "batch": 8, "held_out": 4, "max_tokens": 32 * 8 * 4, "eval_every": 2, "save_every": 4}
    named = {"student": str(student), "teacher": str(exports["source"]), "output": str(output)}
    return Healing(**named, data=(str(exports["text"]),), device="cpu", **values)


@pytest.mark.parametrize("form", ["native", "transmla"])
def test_a_merged_lora_is_a_fine_tuned_export(form: str, exports: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    model = peft.get_peft_model(transmla.load(exports[form]), peft.LoraConfig(target_modules=targets))
    train(model, 1e-2)
    folder = save(model.merge_and_unload(), exports[form], tmp_path / "merged")
    verified(folder)
    assert Manifest.read(folder).weights_changed
    assert hub.push(folder, "org/name", dry_run=True).files


def test_a_fine_tuned_export_heals_from_its_own_loss(exports: dict[str, Path], tmp_path: Path) -> None:
    """A training of the latent's projection makes the latent norms real ones; healing must keep them."""
    model = transmla.load(exports["native"], dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.kv_a_proj_with_mqa.weight
            weight.add_(torch.randn_like(weight) / INPUT_SCALE)
    folder = save(model, exports["native"], tmp_path / "tuned")
    teacher = save(model, exports["native"], tmp_path / "teacher")
    values = settings(folder, exports, tmp_path / "healed").model_copy(update={"teacher": str(teacher)})
    assert abs(Manifest.read(heal(values)).healing[-1]["held_out_kl"]["before"]) < 1e-4


def test_what_trainers_leave_is_named_and_not_pushed(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = save(transmla.load(exports["native"]), exports["native"], tmp_path / "again")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "trainer_state.json").write_text("{}")
    failed = [check.detail for check in verify(folder) if not check.passed]
    assert len(failed) == 1
    assert "trainer_state.json was not written by the conversion; remove it" in failed[0]
    assert "training_args.bin was not written by the conversion; remove it" in failed[0]
    assert not (folder / "transmla.json").exists()


def test_a_model_without_a_record_is_no_export(make_source: Callable[..., Path]) -> None:
    with pytest.raises(TransmlaError, match="no finished conversion"):
        Manifest.read(make_source())


def test_a_record_that_was_edited_is_refused(
    exports: dict[str, Path], tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    folder = save(transmla.load(exports["native"]), exports["native"], tmp_path / "again")
    config = json.loads((folder / "config.json").read_text())
    config["transmla"]["plan"]["dtype"] = "int4"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TransmlaError, match="does not describe a conversion"):
        list(verify(folder))
