"""``transmla plan`` reads headers only: no weights of a file, a folder or a Hub model are read or downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_server import TOKEN, Blob, HubServer
from helpers.tiny_gguf import MODEL, write_architecture, write_gguf
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from huggingface_hub.utils._http import http_backoff

from transmla.convert.prepare import prepare, summarise
from transmla.errors import TransmlaError
from transmla.recipe import Recipe
from transmla.source import checkpoint, gguf, gguf_weights
from transmla.source.locate import resolve_source

REPO_ID = "people/model"
Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running Hub with an empty cache, without Xet and long waits between retries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(http_backoff.__kwdefaults__, "base_wait_time", 0.01)
    monkeypatch.setitem(http_backoff.__kwdefaults__, "max_wait_time", 0.01)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    disable_progress_bars()
    with HubServer() as server:
        for place in ("constants.ENDPOINT", "hf_api.api.endpoint"):
            monkeypatch.setattr(f"huggingface_hub.{place}", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
    enable_progress_bars()


@pytest.fixture
def plan(make_recipe: Callable[..., Recipe]) -> Plan:
    """``plan(source, **settings)`` → the summary that ``transmla plan`` shows, without the measured time."""

    def run(source: str | Path, **settings: Any) -> dict[str, Any]:
        summary = summarise(prepare(make_recipe(source, **settings), weights=False))
        return {name: value for name, value in summary.items() if name not in ("seconds", "memory_bytes")}

    return run


def upload(hub: HubServer, folder: Path) -> None:
    """Commit the files of ``folder``, weights to LFS."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    tree = {name: Blob(data, name.endswith((".safetensors", ".bin"))) for name, data in files.items()}
    hub.create(REPO_ID).commit("main", tree, "files")


def no_weights(*_: object) -> None:
    raise AssertionError("a weight was read")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_hub_model_is_planned_without_its_weights(
    shards: int, hub: HubServer, make_source: Callable[..., Path], plan: Plan, tmp_path: Path
) -> None:
    source = make_source("qwen3_moe" if shards > 1 else "llama", num_hidden_layers=3)
    if shards > 1:
        shard(source)
    expected = plan(source)
    upload(hub, source)
    for name in hub.repos[REPO_ID].tree():
        if name.endswith(".safetensors"):  # with the header there is room for weights, to count what is downloaded
            pad(hub, name)
    assert plan(REPO_ID) == expected
    weights = {name: count for name, count in hub.served.items() if name.endswith(".safetensors")}
    assert len(weights) == shards
    assert max(weights.values()) <= 100_001
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


def shard(folder: Path) -> None:
    """Save the model in three files."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=size // 2)
    assert len([*folder.glob("*.safetensors")]) == 3


def pad(hub: HubServer, name: str) -> None:
    """Make a file larger than what is read for its header."""
    tree = hub.repos[REPO_ID].tree()
    tree[name] = Blob(tree[name].data + bytes(200_000), lfs=True)


def test_weights_in_the_cache_are_read_there(hub: HubServer, make_source: Callable[..., Path], plan: Plan) -> None:
    from huggingface_hub import snapshot_download

    upload(hub, make_source())
    snapshot_download(REPO_ID)
    hub.served.clear()
    plan(REPO_ID)
    assert not [name for name in hub.served if name.endswith(".safetensors")]


def test_a_quantised_model_of_the_hub_is_refused_by_its_header(
    hub: HubServer, make_source: Callable[..., Path], plan: Plan
) -> None:
    from safetensors.torch import load_file, save_file

    source = make_source()
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, source / "model.safetensors")
    upload(hub, source)
    with pytest.raises(TransmlaError, match=rf"tensor '{name}' is stored as I8"):
        plan(REPO_ID)


def test_a_damaged_header_on_the_hub_is_an_error_of_one_line(
    hub: HubServer, make_source: Callable[..., Path], plan: Plan
) -> None:
    source = make_source()
    (source / "model.safetensors").write_bytes(bytes(8) + b"nothing")
    upload(hub, source)
    with pytest.raises(TransmlaError, match=r"cannot read the headers of the weights of 'people/model' on the Hub"):
        plan(REPO_ID)


def test_a_hub_that_fails_is_an_error_of_one_line(
    hub: HubServer, make_source: Callable[..., Path], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, make_source())
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda *_, **__: no_network())
    with pytest.raises(TransmlaError, match=r"cannot reach the Hub for 'people/model'"):
        plan(REPO_ID)


def no_network() -> None:
    raise ConnectionError


def test_a_hub_model_of_pickles_is_refused_as_for_a_conversion(
    hub: HubServer, make_source: Callable[..., Path], plan: Plan
) -> None:
    source = make_source()
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"x")
    upload(hub, source)
    with pytest.raises(TransmlaError, match=r"no weights in '.*'; expected model.safetensors"):
        plan(REPO_ID)
    assert "pytorch_model.bin" not in hub.served


def test_a_folder_is_planned_by_its_headers(
    make_source: Callable[..., Path], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = checkpoint.open_checkpoint(make_source())
    opened.read = no_weights  # type: ignore[assignment]
    monkeypatch.setattr(checkpoint, "_open_safetensors", lambda *_: opened)
    assert plan(opened.folder)["parameters"] > 0


def test_a_gguf_file_is_planned_by_its_header(
    plan: Plan, tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGUFReader

    write_architecture(tmp_path / "x.gguf", "llama")
    read, sizes = GGUFReader.__init__, []

    def record(self: GGUFReader, path: Path, *args: Any) -> None:
        sizes.append(Path(path).stat().st_size)
        read(self, path, *args)

    # This reader takes seconds for a vocabulary, so it gets a copy of the header without one.
    monkeypatch.setattr(GGUFReader, "__init__", record)
    monkeypatch.setattr(gguf_weights.GgufWeights, "read", no_weights)
    monkeypatch.setattr(gguf, "_unpack", no_weights)
    planned = plan(tmp_path / "x.gguf", format="transmla")
    assert planned["cache_ratio"] < 1
    assert max(sizes) < 5_000 < (tmp_path / "x.gguf").stat().st_size
    assert not [*assets.rglob("config.json")]


def test_a_gguf_file_that_was_unpacked_is_planned_from_its_folder(
    plan: Plan, tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path)
    packed = plan(tmp_path / MODEL, format="transmla")
    folder = resolve_source(str(tmp_path / MODEL))
    monkeypatch.setattr(gguf_weights.GgufWeights, "__init__", no_weights)
    assert resolve_source(str(tmp_path / MODEL), weights=False) == folder
    assert plan(tmp_path / MODEL, format="transmla") == packed
