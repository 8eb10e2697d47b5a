"""A downloaded folder runs no code, reads nothing outside itself, and publishes nothing of this machine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.command_line import CALIBRATION, Run, refuses
from helpers.edit_json import edit_json
from helpers.forked import forked
from safetensors.torch import load_file

import transmla
from transmla.errors import TransmlaError

OFF = ["--reconstruct", "off", "--heal", "off", "--device", "cpu", *CALIBRATION]
EVAL = ["--text", "text.txt", "--window", "32", "--max-windows", "1", "--device", "cpu"]
HEAL = [
    "--data",
    "text.txt",
    "--length",
    "16",
    "--batch",
    "2",
    "--held-out",
    "2",
    "--max-tokens",
    "32",
    "--device",
    "cpu",
]
# Every verb that reads a source, and the rest of its command line.
READERS: dict[str, list[str]] = {
    "plan": ["plan", "source", *OFF],
    "inspect": ["inspect", "source", *CALIBRATION, "--device", "cpu"],
    "convert": ["convert", "source", "-o", "out", *OFF],
    "eval": ["eval", "source", *EVAL],
    "baseline": ["eval", "many", "--baseline", "source", *EVAL],
    "bench": ["bench", "source", "--batch", "1", "--context", "8", "--steps", "1", "--device", "cpu"],
    "teacher": ["heal", "export", "--teacher", "source", "-o", "out", *HEAL],
}
CODE = (
    "open({mark!r}, 'w').close()\n"
    "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    "class Mine(PreTrainedTokenizerFast): pass\n"
    "class MyConfig(LlamaConfig): pass\n"
    "class MyModel(LlamaForCausalLM): pass\n"
)


def code_in_tokenizer(source: Path) -> None:
    edit_json(
        source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]}, tokenizer_class="Mine"
    )


def code_in_config(source: Path) -> None:
    edit_json(source / "config.json", auto_map={"AutoConfig": "mine.MyConfig"}, model_type="mine")


def code_in_model(source: Path) -> None:
    maps = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    edit_json(source / "config.json", auto_map=maps, model_type="mine")


def code_of_the_hub(source: Path) -> None:
    edit_json(source / "config.json", _attn_implementation="kernels-community/flash-attn")


@pytest.fixture
def exported(place: Path, run: Run) -> Path:
    """``place`` with ``export``, a conversion of ``source``."""
    assert run("convert", "source", "-o", "export", *OFF)[0] == 0
    return place


@pytest.mark.parametrize("plant", [code_in_tokenizer, code_in_config, code_in_model, code_of_the_hub])
def test_no_code_of_a_checkpoint_runs_whatever_standard_input_says(
    exported: Path, plant: Callable[[Path], None]
) -> None:
    mark = exported / "RAN"
    (exported / "source" / "mine.py").write_text(CODE.format(mark=str(mark)))
    plant(exported / "source")
    for verb, argv in READERS.items():
        ended = forked(*argv, stdin=b"y\n" * 50)
        assert not mark.exists(), verb
        assert "Traceback" not in ended.text, verb
        assert ended.code == 2 or plant is code_in_tokenizer, verb
    with pytest.raises(TransmlaError):
        transmla.load(exported / "source")
    assert not mark.exists()


@pytest.mark.parametrize("verb", READERS)
def test_pickled_weights_need_the_flag_in_every_verb(exported: Path, run: Run, verb: str) -> None:
    torch.save(load_file("source/model.safetensors"), "source/pytorch_model.bin")
    Path("source/model.safetensors").unlink()
    refuses(run, *READERS[verb], says="holds pickled weights (pytorch_model.bin)")
    if verb in ("plan", "eval"):
        assert run(*READERS[verb], "--allow-pickle")[0] == 0


def test_a_package_is_not_imported_to_find_a_file(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("evil/inner").mkdir(parents=True)
    Path("evil/__init__.py").write_text("open('RAN', 'w').close()")
    Path("evil/inner/__init__.py").touch()
    monkeypatch.syspath_prepend(str(place))
    refuses(run, "plan", "package:evil.inner/x.gguf", says="package 'evil.inner' is not installed")
    refuses(run, "plan", "package:json/../os.py", says="package 'json' has no file '../os.py'")
    assert not Path("RAN").exists()


LINKED = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt", "tokenizer.model")


@pytest.mark.parametrize("name", [*LINKED, "chat_templates/a.jinja", "chat_templates", "generation_config.json"])
def test_links_that_leave_a_source_are_not_followed(place: Path, run: Run, name: str) -> None:
    secret = place / "secret"
    (secret if name == "chat_templates" else place).mkdir(exist_ok=True)
    if name != "chat_templates":
        secret.write_text("hf_SECRET")
    link = place / "source" / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    refuses(run, "convert", "source", "-o", "out", *OFF, says="is a link to a place outside its folder")


def test_the_links_of_the_hubs_cache_are_followed(place: Path, run: Run) -> None:
    model = place / "models--org--name"
    snapshot, blobs = model / "snapshots" / ("0" * 40), model / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree("source", blobs)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    assert run("convert", str(snapshot), "-o", "out", *OFF)[0] == 0
    assert not [file for file in Path("out").iterdir() if file.is_symlink()]


@pytest.mark.parametrize(
    "target", ["../elsewhere.safetensors", "/{place}/elsewhere.safetensors", "a\\b.safetensors", ".."]
)
def test_an_index_names_files_beside_itself(place: Path, run: Run, target: str) -> None:
    index = Path("many/model.safetensors.index.json")
    shard = sorted(Path("many").glob("model-*.safetensors"))[0]
    shutil.copy(shard, "elsewhere.safetensors")
    target = target.format(place=place)
    index.write_text(index.read_text().replace(shard.name, json.dumps(target)[1:-1]))
    for argv in (["convert", "many", "-o", "out", *OFF], ["eval", "many", *EVAL]):
        refuses(run, *argv, says="is not the name of a file beside the index")


def test_an_exports_link_is_neither_verified_nor_pushed(exported: Path, run: Run) -> None:
    (exported / "secret").write_text("hf_SECRET")
    assert run("verify", "export")[0] == 0
    Path("export/README.md").unlink()
    Path("export/README.md").symlink_to(exported / "secret")
    code, out, _ = run("verify", "export")
    assert code == 1
    assert "README.md is a link that leads out of the folder" in out


def test_an_export_holds_no_local_path(exported: Path, run: Run) -> None:
    source, text = str(exported / "source"), str(exported / "text.txt")
    calibration = ["--calibration", text, *CALIBRATION[2:]]
    assert run("convert", source, "-o", str(exported / "whole"), *OFF[:-6], *calibration)[0] == 0
    data = ["--data", text, *HEAL[2:]]
    assert run("heal", str(exported / "whole"), "--teacher", source, "-o", str(exported / "healed"), *data)[0] == 0
    for folder in ("whole", "healed"):
        holding = [f.name for f in Path(folder).rglob("*") if f.is_file() and str(exported).encode() in f.read_bytes()]
        assert holding == [], folder


def test_files_have_the_mode_that_the_umask_leaves(place: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        shutil.rmtree("out", ignore_errors=True)
        assert forked("convert", "source", "-o", "out", *OFF, prepare=lambda mask=mask: os.umask(mask)).code == 0
        assert {file.name: file.stat().st_mode & 0o777 for file in Path("out").iterdir()} == {
            file.name: mode for file in Path("out").iterdir()
        }


@pytest.mark.parametrize(
    "source",
    ["https://user:hf_SECRET@huggingface.co/a/b", "https://hf.co/a/b?token=hf_SECRET", "git+https://hf_SECRET@hf.co/a"],
)
def test_a_token_in_an_address_is_not_echoed(place: Path, run: Run, source: str) -> None:
    code, out, err = run("plan", source)
    assert code == 2
    assert "SECRET" not in out + err


def test_names_are_printed_without_control_characters(place: Path, run: Run) -> None:
    name = "\x1b[31mred\x07\u202e"
    refuses(run, "plan", f"./{name}", says="'./\\x1b[31mred\\x07\\u202e' does not exist")
    index = Path("many/model.safetensors.index.json")
    weights = json.loads(index.read_text())
    weights["weight_map"][name] = "\x1b[2J.safetensors"
    index.write_text(json.dumps(weights))
    refuses(run, "plan", "many", says="shard '\\x1b[2J.safetensors' is missing")
