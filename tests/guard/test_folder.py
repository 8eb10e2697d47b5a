"""Checks of a model's folder: what an ordinary user has on disk passes, and a refusal says what to do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from transmla.errors import TransmlaError
from transmla.guard.config import check_config
from transmla.guard.folder import check_folder
from transmla.source.load import load_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.fixture
def source(converted: Path, tmp_path: Path) -> Path:
    """A copy of a tiny source, with its weights in several shards."""
    model = load_model(converted / "source", dtype=torch.float32)
    whole = shutil.ignore_patterns("*.safetensors")
    folder = Path(shutil.copytree(converted / "source", tmp_path / "real", ignore=whole))
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def link_files(folder: Path, blobs: Path) -> None:
    """Fill ``folder`` with links to the files in ``blobs``."""
    folder.mkdir(parents=True)
    for blob in blobs.iterdir():
        (folder / blob.name).symlink_to(blob)


def passes(folder: Path) -> bool:
    """Return whether the checks let ``folder`` pass, and its weights can be loaded."""
    check_folder(folder)
    check_config(folder)
    return load_model(folder, dtype=torch.float32) is not None


def test_a_folder_may_be_a_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    assert passes(tmp_path / "link")


def test_links_inside_a_folder_are_followed(source: Path) -> None:
    shard = sorted(source.glob("model-*.safetensors"))[0]
    (source / "weights").mkdir()
    shard.rename(source / "weights" / shard.name)
    shard.symlink_to(Path("weights") / shard.name)
    assert passes(source)


@pytest.mark.parametrize("inner", ["", "main-model"])
def test_a_snapshot_of_the_hub_may_have_folders_and_its_blobs_on_another_disk(
    source: Path, tmp_path: Path, inner: str
) -> None:
    model = tmp_path / "models--org--name"
    model.mkdir()
    (model / "blobs").symlink_to(source)
    snapshot = model / "snapshots" / ("0" * 40) / inner
    link_files(snapshot, model / "blobs")
    assert passes(snapshot)


def test_a_link_to_weights_elsewhere_is_refused_with_the_place_and_a_remedy(source: Path, tmp_path: Path) -> None:
    link_files(tmp_path / "linked", source)
    with pytest.raises(TransmlaError) as refusal:
        check_folder(tmp_path / "linked")
    assert "is a link to a place outside its folder" in str(refusal.value)
    assert f"it leads to '{source}/" in str(refusal.value)
    assert "cp -rL FOLDER COPY" in refusal.value.remedy
    shutil.copytree(tmp_path / "linked", tmp_path / "copy", symlinks=False)
    assert passes(tmp_path / "copy")


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model-Q4.gguf"]
)
def test_copies_of_the_weights_that_nothing_reads_may_stay_pointers(source: Path, name: str) -> None:
    (source / name).write_text(POINTER)
    assert passes(source)


def test_every_shard_is_checked(source: Path) -> None:
    last = sorted(source.glob("model-*.safetensors"))[-1]
    last.write_text(POINTER)
    with pytest.raises(TransmlaError, match=re.escape(f"{last.name}' is a pointer of git-lfs")):
        check_folder(source)


def test_pickles_are_checked_where_there_is_nothing_else(source: Path, tmp_path: Path) -> None:
    for shard in source.glob("model*.safetensors*"):
        shard.unlink()
    (tmp_path / "elsewhere.bin").touch()
    (source / "pytorch_model.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(TransmlaError, match="is a link to a place outside its folder"):
        check_folder(source)


@pytest.mark.parametrize("note", ["n_params", "num_parameters", "num_train_tokens", "n_ctx"])
def test_notes_of_a_config_are_no_counts(source: Path, note: str) -> None:
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {note: 8 * 10**9}))
    check_config(source)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_generation_config_without_finite_numbers_is_refused_by_name(source: Path, value: str) -> None:
    (source / "generation_config.json").write_text(f'{{"suppress": [1, {{"bias": {value}}}], "top_k": 5}}')
    with pytest.raises(TransmlaError, match=r"generation_config.json of .*; bias is .*; remove bias"):
        check_config(source)


def test_an_exports_layers_have_known_types(converted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted / "source", tmp_path / "export"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"source_model_type": "llama"}))
    for name in ("full_attention", "sliding_attention", "linear_attention", 3):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_types": ["full_attention", name]}))
        if name in ("full_attention", "sliding_attention"):
            check_config(folder)
        else:
            with pytest.raises(TransmlaError, match=f"layer_types has '{name}'; it may have full_attention and"):
                check_config(folder)
