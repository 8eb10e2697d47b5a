"""A killed conversion resumes, equal runs write equal bytes, and the whole model is never in memory."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interrupted import Killed, KilledAtLayer, files
from helpers.tiny_sources import build_model, build_tokenizer
from safetensors.torch import load_file, save_file

from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.evaluate.verify import verify
from transmla.export import push as hub
from transmla.export import workspace as export
from transmla.plan.fit_settings import FITS, FitSettings
from transmla.recipe import Recipe, parse_recipe
from transmla.source.checkpoint import open_checkpoint

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def recipe(**settings: Any) -> Recipe:
    """Return a recipe with paths relative to the working directory, so that equal runs write equal files."""
    calibration = {"source": "text.txt", "sequences": 4, "length": 32, **settings.pop("calibration", {})}
    values = {"source": "source", "output": "out", "calibration": calibration, "device": "cpu"}
    return parse_recipe(values | settings, "test")


def write_source(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **config: Any) -> None:
    build_model(**config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    build_tokenizer(folder)


def write_text(file: Path) -> None:
    picks = torch.randint(0, len(LETTERS), (2000,), generator=torch.Generator().manual_seed(1))
    file.write_text(" ".join(LETTERS[i] for i in picks))


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """Use one thread: threads slow small matrices down, and subprocesses must add numbers in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("transmla.convert.pipeline.SAVE_SECONDS", 0)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a source, its calibration text and the export of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("original")
    write_source(folder / "source")
    write_text(folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        convert(recipe())
    return folder


@pytest.fixture
def workdir(tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a working directory with links to the same source and text, and no export."""
    for name in ("source", "text.txt"):
        (tmp_path / name).symlink_to(original / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    monkeypatch.setattr("transmla.convert.pipeline.SAVE_SECONDS", 20.0)
    monkeypatch.setattr("transmla.convert.pipeline.time.monotonic", lambda: next(clock))
    with pytest.raises(Killed):
        convert(recipe(), reporter=KilledAtLayer(2))
    monkeypatch.undo()
    monkeypatch.chdir(workdir)
    assert json.loads(Path("out.partial/progress.json").read_text())["next_layer"] == 1
    assert Path("out.partial/model-00003-of-00004.safetensors").is_file()
    convert(recipe(), resume=True)
    assert files(workdir / "out") == files(original / "out")


def manifest(exported: dict[str, bytes]) -> Any:
    return json.loads(exported["transmla.json"])


def test_a_run_resumed_twice_gives_the_same_bytes(workdir: Path, original: Path) -> None:
    for layer, resume in ((1, False), (2, True)):
        with pytest.raises(Killed):
            convert(recipe(), resume=resume, reporter=KilledAtLayer(layer))
    convert(recipe(), resume=True)
    assert files(workdir / "out") == files(original / "out")


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"cache_ratio": 0.4}, {"method": "transmla"}, {"calibration": {"sequences": 5}}],
    ids=lambda change: next(iter(change)),
)
def test_resuming_with_another_setting_is_refused(workdir: Path, change: dict[str, Any]) -> None:
    with pytest.raises(Killed):
        convert(recipe(), reporter=KilledAtLayer(1))
    before = files(workdir / "out.partial")
    with pytest.raises(TransmlaError, match="begun with other weights, settings or versions"):
        convert(recipe(**change), resume=True)
    assert files(workdir / "out.partial") == before


def test_resuming_with_other_weights_is_refused(workdir: Path, original: Path) -> None:
    Path("source").unlink()
    shutil.copytree(original / "source", "source")
    with pytest.raises(Killed):
        convert(recipe(), reporter=KilledAtLayer(1))
    weights = load_file("source/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(weights, "source/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TransmlaError, match="begun with other weights"):
        convert(recipe(), resume=True)


def test_damaged_hidden_states_are_refused(workdir: Path) -> None:
    with pytest.raises(Killed):
        convert(recipe(), reporter=KilledAtLayer(1))
    (stream,) = Path("out.partial").glob("stream-*.safetensors")
    data = bytearray(stream.read_bytes())
    data[-1] ^= 1
    stream.write_bytes(bytes(data))
    with pytest.raises(TransmlaError, match="is damaged"):
        convert(recipe(), resume=True)


def test_the_seed_decides_every_byte_of_a_self_calibrated_run(workdir: Path, assets: Path) -> None:
    runs = []
    for seed in (0, 0, 1):
        shutil.rmtree(assets, ignore_errors=True)  # sample again, instead of reading the cached samples
        convert(recipe(calibration={"source": "self"}, seed=seed))
        runs.append(files(workdir / "out"))
        shutil.rmtree("out")
    shard = "model-00002-of-00004.safetensors"
    assert runs[0] == runs[1]
    assert runs[0][shard] != runs[2][shard]


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


def test_existing_files_are_never_overwritten(workdir: Path) -> None:
    Path("out").mkdir()
    Path("out/mine").write_text("mine")
    with pytest.raises(TransmlaError, match="not empty"):
        convert(recipe())
    assert files(workdir / "out") == {"mine": b"mine"}
    Path("out/mine").unlink()
    with pytest.raises(Killed):  # an empty output folder is accepted
        convert(recipe(), reporter=KilledAtLayer(1))
    before = files(workdir / "out.partial")
    with pytest.raises(TransmlaError, match=r"unfinished run is in 'out.partial'.*--resume"):
        convert(recipe())
    assert files(workdir / "out.partial") == before


def test_a_source_of_many_shards_gives_the_same_bytes(workdir: Path, original: Path) -> None:
    Path("source").unlink()
    write_source(workdir / "source", shard="20KB")
    assert len(list(Path("source").glob("model-*.safetensors"))) > 5
    convert(recipe())
    assert files(workdir / "out") == files(original / "out")


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


def test_a_disk_too_small_is_refused_before_anything_is_written(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(workdir)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(TransmlaError, match=r"has 0\.0 GB free"):
        convert(recipe())
    assert not Path("out.partial").exists()


@pytest.mark.parametrize(
    ("stored", "exported"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_the_export_keeps_the_precision_of_its_source(
    workdir: Path, stored: torch.dtype, exported: torch.dtype
) -> None:
    Path("source").unlink()
    write_source(workdir / "source", dtype=stored)
    opened = open_checkpoint(convert(recipe(calibration={"source": "self"})))
    assert {opened.read(name).dtype for name in opened.shapes} == {exported}
    assert json.loads(Path("out/config.json").read_text())["dtype"] == str(exported).removeprefix("torch.")
    assert all(check.passed for check in verify(Path("out"), source="source"))


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_written_whether_tied_or_not(workdir: Path, tied: bool) -> None:
    Path("source").unlink()
    write_source(workdir / "source", tie_word_embeddings=tied)
    source, opened = open_checkpoint(Path("source")), open_checkpoint(convert(recipe()))
    assert ("lm_head.weight" in source.shapes) is not tied
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert torch.equal(opened.read("lm_head.weight"), source.read(head))
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False


MEMORY = """
import sys
from dataclasses import replace
from transmla.convert.pipeline import convert
from transmla.plan.fit_settings import FITS
from transmla.recipe import Recipe
FITS["fast"] = replace(FITS["fast"], steps=2)
convert(Recipe.model_validate_json(sys.argv[1]))
# ru_maxrss would include the parent's peak, which a child process inherits.
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's high-water mark")
def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """With 12 more layers of 16 MB, the peak resident memory, mapped pages included, grows by less than 48 MB.

    The allocator alone moves the peak by 30 MB; a conversion that kept its layers would add 192 MB.
    """
    write_text(tmp_path / "text.txt")
    wide = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    peaks = {}
    for layers in (4, 16):
        folder = tmp_path / f"source-{layers}"
        write_source(folder, shard="20MB", layout="mqa", intermediate_size=5000, num_hidden_layers=layers, **wide)
        argument = recipe(source=str(folder), output=f"out-{layers}").model_dump_json()
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, argument],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        peaks[layers] = int(done.stdout.split()[-1]) * 1024
    assert peaks[16] - peaks[4] < 48e6
