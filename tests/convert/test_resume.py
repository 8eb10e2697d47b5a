"""A killed conversion resumes to the bytes of an unbroken run, or is refused."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.conversions import recipe, write_source
from helpers.interrupted import Killed, KilledAtLayer, files

from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.evaluate.verify import verify
from transmla.export import push as hub
from transmla.export import workspace as export
from transmla.plan.fit_settings import FITS, FitSettings

pytestmark = pytest.mark.usefixtures("single_thread")


def manifest(exported: dict[str, bytes]) -> Any:
    return json.loads(exported["transmla.json"])


def assert_refused_as_unfinished() -> None:
    """Check that ``verify`` and ``push`` refuse the unfinished folder."""
    partial = Path("out.partial")
    assert not Path("out").exists()
    with pytest.raises(TransmlaError, match="no finished conversion"):
        list(verify(partial))
    with pytest.raises(TransmlaError, match="no finished conversion"):
        hub.push(partial, "org/name", dry_run=True)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_run_killed_after_any_layer_resumes_to_the_same_bytes(workdir: Path, original: Path, layer: int) -> None:
    with pytest.raises(Killed):
        convert(recipe(), reporter=KilledAtLayer(layer))
    assert_refused_as_unfinished()
    assert json.loads(Path("out.partial/progress.json").read_text())["next_layer"] == layer
    convert(recipe(), resume=True)
    assert files(workdir / "out") == files(original / "out")
    assert not Path("out.partial").exists()


def kill_at(call: str, index: int, *, after: bool) -> Callable[..., Any]:
    """Return ``Path.call`` that raises Killed at its ``index``-th call, before or after the call's work is done."""
    real, calls = getattr(Path, call), iter(range(10**6))

    def dying(self: Path, *args: Any, **kwargs: Any) -> Any:
        last = next(calls) == index
        if last and not after:
            raise Killed
        result = real(self, *args, **kwargs)
        if last:
            raise Killed
        return result

    return dying


@pytest.mark.parametrize(
    ("call", "after"), [("replace", False), ("replace", True), ("unlink", False), ("unlink", True)]
)
def test_a_run_killed_at_any_write_resumes_to_the_same_bytes(
    workdir: Path, original: Path, call: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file gets its name by ``replace`` and is deleted by ``unlink``; the run is killed at each call in turn."""
    expected, deaths = files(original / "out"), 0
    while True:
        monkeypatch.setattr(Path, call, kill_at(call, deaths, after=after))
        try:
            convert(recipe())
        except Killed:
            deaths += 1
        else:
            break
        finally:
            monkeypatch.undo()
            monkeypatch.chdir(workdir)
        if not Path("out").exists():  # the last replace gives the folder its name
            assert_refused_as_unfinished()
            convert(recipe(), resume=True)
        assert files(workdir / "out") == expected, f"died at {call} {deaths}"
        shutil.rmtree(workdir / "out")
    assert deaths >= (15 if call == "replace" else 4)


SIGKILL = """
import os, signal, sys
from dataclasses import replace
from transmla.convert.pipeline import convert
from transmla.plan.fit_settings import FITS
from transmla.recipe import Recipe
from transmla.reporter import Silent
class Reporter(Silent):
    def advance(self, done, note=""):
        if note.startswith("error"): os.kill(os.getpid(), signal.SIGKILL)
FITS["fast"] = replace(FITS["fast"], steps=int(sys.argv[2]))  # as in this process
convert(Recipe.model_validate_json(sys.argv[1]), reporter=Reporter())
"""


def test_a_process_killed_by_sigkill_resumes_to_the_same_bytes(workdir: Path, original: Path) -> None:
    """The process is killed before the hidden states are saved for the first time, and loses that work."""
    arguments = [recipe().model_dump_json(), str(FITS["fast"].steps)]
    done = subprocess.run([sys.executable, "-c", SIGKILL, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert_refused_as_unfinished()
    convert(recipe(), resume=True)
    assert files(workdir / "out") == files(original / "out")


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_fit_of_several_layers_resumes_to_the_same_bytes(
    workdir: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors that a window fitted for later layers are saved too."""
    monkeypatch.setitem(FITS, "full", FitSettings(steps=12, tokens=64, rate=5e-3, through_mlp=True, window=window))
    Path("source").unlink()
    write_source(Path("source"), num_hidden_layers=4)
    settings: dict[str, Any] = {"reconstruct": "full", "kv_lora_rank": 12, "qk_rope_head_dim": 4}
    convert(recipe(**settings))
    expected = files(workdir / "out")
    changed = [layer["held_out_after"] < layer["held_out_before"] for layer in manifest(expected)["layers"]]
    assert any(changed[:-1])
    shutil.rmtree("out")
    for layer in (1, 3):
        with pytest.raises(Killed):
            convert(recipe(**settings), resume=layer > 1, reporter=KilledAtLayer(layer))
    convert(recipe(**settings), resume=True)
    assert files(workdir / "out") == expected


@pytest.mark.parametrize("times", [(0.0, 30.0, 30.0, 31.0), (0.0, 30.0, 35.0, 75.0)], ids=["soon", "slow save"])
def test_layers_written_after_the_last_save_are_converted_again(
    times: tuple[float, ...], workdir: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after the first layer and killed after the second: the second layer's shard exists and is overwritten."""
    clock = iter(times)
    monkeypatch.setattr("transmla.convert.shard_writer.SAVE_SECONDS", 20.0)
    monkeypatch.setattr("transmla.convert.shard_writer.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(Killed):
        convert(recipe(), reporter=KilledAtLayer(2))
    monkeypatch.undo()
    monkeypatch.chdir(workdir)
    assert json.loads(Path("out.partial/progress.json").read_text())["next_layer"] == 1
    assert Path("out.partial/model-00003-of-00004.safetensors").is_file()
    convert(recipe(), resume=True)
    assert files(workdir / "out") == files(original / "out")


def test_a_run_whose_first_layers_are_kept_resumes_to_the_same_bytes(workdir: Path) -> None:
    """After a kept layer, the hidden states of the source and of the export are one tensor."""
    settings = {"format": "transmla", "layers": "1", "reconstruct": "fast"}
    convert(recipe(**settings))
    whole = files(workdir / "out")
    shutil.rmtree("out")
    with pytest.raises(Killed):
        convert(recipe(**settings), reporter=KilledAtLayer(1))
    assert json.loads(Path("out.partial/progress.json").read_text())["next_layer"] == 1
    convert(recipe(**settings), resume=True)
    assert files(workdir / "out") == whole


def test_a_run_resumed_twice_gives_the_same_bytes(workdir: Path, original: Path) -> None:
    for layer, resume in ((1, False), (2, True)):
        with pytest.raises(Killed):
            convert(recipe(), resume=resume, reporter=KilledAtLayer(layer))
    convert(recipe(), resume=True)
    assert files(workdir / "out") == files(original / "out")


def test_a_self_calibrated_run_resumes_without_sampling_again(
    workdir: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"calibration": {"source": "self"}}
    convert(recipe(**settings))
    expected = files(workdir / "out")
    shutil.rmtree("out")
    with pytest.raises(Killed):
        convert(recipe(**settings), reporter=KilledAtLayer(1))
    shutil.rmtree(assets)  # the resumed run reads the tokens that the folder of the first run holds
    monkeypatch.setattr("transmla.source.samples.sample_self", None)
    convert(recipe(**settings), resume=True)
    assert files(workdir / "out") == expected


@pytest.mark.parametrize("shard", [1, 2, 3, 4])
@pytest.mark.parametrize("error", ["os", "safetensors"])
def test_a_full_disk_says_how_to_resume(
    workdir: Path, original: Path, shard: int, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    full = OSError(errno.ENOSPC, "No space left on device") if error == "os" else SafetensorError("No space left")
    write = export.write_tensors

    def fill(path: Path, tensors: dict[str, torch.Tensor], **kwargs: Any) -> None:
        if path.name.startswith(f"model-0000{shard}"):
            raise full
        write(path, tensors, **kwargs)

    monkeypatch.setattr(export, "write_tensors", fill)
    with pytest.raises(TransmlaError, match=r"disk .* is full; .* kept; .*--resume"):
        convert(recipe())
    assert_refused_as_unfinished()
    monkeypatch.setattr(export, "write_tensors", write)
    convert(recipe(), resume=True)
    assert files(workdir / "out") == files(original / "out")
