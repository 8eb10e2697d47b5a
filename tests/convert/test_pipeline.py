"""Equal runs write equal bytes, nothing is overwritten, and the whole model is never in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.conversions import recipe, write_source, write_text
from helpers.interrupted import Killed, KilledAtLayer, files

from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.evaluate.verify import verify
from transmla.source.checkpoint import open_checkpoint

pytestmark = pytest.mark.usefixtures("single_thread")


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
