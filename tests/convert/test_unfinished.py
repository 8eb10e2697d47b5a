"""A folder OUTPUT.partial is continued only if it is whole, one's own and free; otherwise it is refused untouched."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.edit_json import edit_json
from helpers.interrupted import Killed, KilledAtLayer, files

from transmla.convert.layers import LayerConverter
from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.export.workspace import Workspace
from transmla.files import TEMPORARY, write_tensors
from transmla.recipe import Recipe, parse_recipe
from transmla.reporter import Silent


class Log(Silent):
    """A reporter that keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def recipe(**settings: Any) -> Recipe:
    calibration = {"source": "text.txt", "sequences": 4, "length": 32}
    values = {"source": "source", "output": "out", "calibration": calibration, "device": "cpu", "reconstruct": "off"}
    return parse_recipe(values | settings, "test")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a source of three layers, its text, its export, and a run killed after its second layer."""
    from conftest import save_source, write_text

    folder = tmp_path_factory.mktemp("original")
    save_source(folder / "source", num_hidden_layers=3)
    (folder / "source" / "LICENSE").write_text("free")
    (folder / "source" / "additional_chat_templates").mkdir()
    (folder / "source" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    write_text(folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("transmla.convert.shard_writer.SAVE_SECONDS", 0)
        convert(recipe())
        Path("out").rename("whole")
        with pytest.raises(Killed):
            convert(recipe(), reporter=KilledAtLayer(2))
        yield folder


@pytest.fixture
def workdir(tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a copy of the source, the text and the killed run."""
    for name in ("source", "out.partial"):
        shutil.copytree(original / name, tmp_path / name)
    shutil.copy(original / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(folder: Path) -> dict[str, Any]:
    """Return every path below ``folder``, with its link, its bytes, or None for a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(p): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None for p in paths}


def refused_untouched(says: str, folder: Path, **settings: Any) -> None:
    before = state(folder)
    with pytest.raises(TransmlaError, match=says):
        convert(recipe(**settings), resume=True)
    assert state(folder) == before


def resumed_to_the_same_bytes(original: Path, reporter: Silent | None = None) -> None:
    convert(recipe(), resume=True, reporter=reporter)
    assert files(Path("out")) == files(original / "whole")
    assert sorted(path.name for path in Path().iterdir()) == ["out", "source", "text.txt"]


def test_what_a_killed_library_was_writing_is_deleted(workdir: Path, original: Path) -> None:
    partial = workdir / "out.partial"
    (partial / ".tmpAbCdEf").write_bytes(b"x" * 1000)  # safetensors, before files were written in a folder
    (partial / "config.json.tmp").write_text("{")
    (partial / f"{TEMPORARY}abc").mkdir()
    (partial / f"{TEMPORARY}abc" / ".tmpAbCdEf").write_bytes(b"x" * 1000)
    resumed_to_the_same_bytes(original)


def test_libraries_write_into_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever safetensors names its temporary file, the folder of the export holds no trace of it."""

    def save(_: Any, file: Path, **__: Any) -> None:
        file.with_name(".tmpAbCdEf").write_bytes(b"half")
        raise Killed

    monkeypatch.setattr("safetensors.torch.save_file", save)
    monkeypatch.setattr("transmla.files.shutil.rmtree", lambda _: None)  # a killed process cleans nothing
    with pytest.raises(Killed):
        write_tensors(tmp_path / "model.safetensors", {})
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(TEMPORARY)
    assert (left / ".tmpAbCdEf").is_file()


FOREIGN: dict[str, Callable[[Path], object]] = {
    "files": lambda p: (p.mkdir(), (p / "thesis.tmp").write_text("mine"), (p / "stream-notes.txt").write_text("mine")),
    "a temporary file alone": lambda p: (p.mkdir(), (p / "thesis.tmp").write_text("mine")),
    "a progress of something else": lambda p: (p.mkdir(), (p / "progress.json").write_text('{"percent": 3}')),
    "a healing": lambda p: (p.mkdir(), (p / "healing.json").write_text("{}")),
    "a link": lambda p: ((p.parent / "mine").mkdir(), p.symlink_to("mine")),
    "a dangling link": lambda p: p.symlink_to("nowhere"),
    "a file": lambda p: p.write_text("mine"),
    "an export": lambda p: shutil.copytree(p.parent / "whole", p),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_folder_is_refused_untouched(kind: str, workdir: Path, original: Path) -> None:
    shutil.rmtree("out.partial")
    if kind == "an export":
        shutil.copytree(original / "whole", "whole")
        manifest = json.loads(Path("whole/transmla.json").read_text())
        Path("whole/transmla.json").write_text(json.dumps(manifest | {"recipe": "another"}))
    FOREIGN[kind](workdir / "out.partial")
    refused_untouched("out.partial", workdir)


@pytest.mark.parametrize("kind", ["a file", "a link", "a shard of another run"])
def test_a_stranger_in_the_folder_is_named(kind: str, workdir: Path) -> None:
    name = {"a file": "notes.txt", "a link": "model-00001-of-00005.safetensors"}.get(
        kind, "model-00001-of-00009.safetensors"
    )
    file = workdir / "out.partial" / name
    if kind == "a link":
        file.rename(workdir / "elsewhere")
        file.symlink_to(workdir / "elsewhere")
    else:
        file.write_text("mine")
    refused_untouched(f"'out.partial/{name}' was not written by this conversion", workdir)


def test_another_source_is_named_before_foreign_files(workdir: Path, original: Path) -> None:
    """A source with other layers has shards of other names, which are not the user's files."""
    from conftest import save_source

    save_source(workdir / "deeper", num_hidden_layers=5)
    before, after = re.escape(str(original / "source")), re.escape(str(workdir / "deeper"))
    says = rf"begun with .*; --source was {before} and is {after}, the source's .* changed"
    refused_untouched(says, workdir / "out.partial", source="deeper")


def test_a_resume_says_where_it_continues(workdir: Path) -> None:
    log = Log()
    convert(recipe(), resume=True, reporter=log)
    assert "resuming at layer 2 of 3" in log.messages


def test_a_resume_of_nothing_is_said(workdir: Path) -> None:
    shutil.rmtree("out.partial")
    log, fresh = Log(), Log()
    convert(recipe(), resume=True, reporter=log)
    assert "nothing to resume in 'out.partial': starting anew" in log.messages
    convert(recipe(output="again"), reporter=fresh)
    assert not any("resum" in message for message in fresh.messages)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "swapped", "deleted", "embedding flipped"])
def test_damaged_shards_are_made_again(damage: str, workdir: Path, original: Path) -> None:
    first, second = (workdir / f"out.partial/model-0000{i}-of-00005.safetensors" for i in (2, 3))
    if damage == "truncated":
        first.write_bytes(first.read_bytes()[:-5])
    elif damage == "deleted":
        first.unlink()
    elif damage == "swapped":
        first.rename("x")
        second.rename(first)
        Path("x").rename(second)
    else:
        file = first if damage == "flipped" else workdir / "out.partial/model-00001-of-00005.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(bytes(data))
    log = Log()
    resumed_to_the_same_bytes(original, log)
    assert any("starting again from the first layer" in message for message in log.messages)


@pytest.mark.parametrize("change", [{"next_layer": 1}, {"final_norm": 1.5}, {"hashes": {}}, {"layers": []}], ids=str)
def test_an_edited_progress_is_refused(change: dict[str, Any], workdir: Path) -> None:
    edit_json(workdir / "out.partial" / "progress.json", **change)
    refused_untouched("progress.json' is damaged|was not written by this conversion", workdir)


@pytest.mark.parametrize("name", ["calibration.safetensors", "stream-00002.safetensors"])
@pytest.mark.parametrize("length", [0, 7, 500])
def test_a_file_cut_off_is_named(name: str, length: int, workdir: Path) -> None:
    file = workdir / "out.partial" / name
    file.write_bytes(file.read_bytes()[:length])
    refused_untouched(f"{name}' is damaged", workdir)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "LICENSE",
        "special_tokens_map.json",
    ],
)
def test_every_file_beside_the_weights_counts(name: str, workdir: Path) -> None:
    file = workdir / "source" / name
    text = file.read_text() if file.exists() else "{}"
    file.write_text(text.replace("{", "{ ", 1) if "{" in text else text + " ")
    refused_untouched("other files beside the weights", workdir)


def test_a_living_process_keeps_others_out_and_a_dead_one_does_not(workdir: Path, original: Path) -> None:
    holder = os.fork()
    if holder == 0:
        try:
            with Workspace(Path("out"), shards=5) as workspace:
                workspace.hold()
                Path("held").touch()
                time.sleep(60)
        finally:
            os._exit(1)
    while not Path("held").exists():
        time.sleep(0.01)
    refused_untouched("another process is writing into 'out.partial'", workdir)
    # A remedy to delete the folder would cost the living process its work.
    with pytest.raises(TransmlaError, match=r"another process is writing into 'out\.partial'"):
        convert(recipe())
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    Path("held").unlink()
    resumed_to_the_same_bytes(original)


def test_a_run_killed_before_the_last_renaming_only_renames(
    workdir: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree("out.partial")
    shutil.copytree(original / "whole", "out.partial")
    monkeypatch.setattr(LayerConverter, "convert", None)
    tokenizer = Path("source/tokenizer.json")
    text = tokenizer.read_text()
    tokenizer.write_text(text + " ")
    refused_untouched("other settings, weights or versions; the source's tokenizer.json changed; ", workdir)
    tokenizer.write_text(text)
    resumed_to_the_same_bytes(original)


def test_an_output_that_is_a_link_is_refused(workdir: Path) -> None:
    shutil.rmtree("out.partial")
    Path("empty").mkdir()
    Path("out").symlink_to("empty")
    refused_untouched("nothing is ever overwritten", workdir)
