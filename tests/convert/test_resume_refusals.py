"""Which run may be resumed: paths may be written otherwise; other settings, texts and weights are refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.conversions import recipe
from helpers.interrupted import Killed, KilledAtLayer, files
from safetensors.torch import load_file, save_file

from transmla.convert.pipeline import convert
from transmla.errors import TransmlaError
from transmla.export import workspace as export
from transmla.export.state import write_state
from transmla.recipe import Recipe

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"; --seed was 0 and is 1; repeat"),
        ({"cache_ratio": 0.4}, r"; --cache-ratio was not given and is 0\.4; repeat"),
        ({"method": "transmla"}, r"; --method was calibrated and is transmla, --reconstruct was fast and is off;"),
        ({"calibration": {"sequences": 5}}, r"; --calibration-sequences was 4 and is 5; repeat"),
        ({"dtype": "bfloat16", "seed": 2}, r"; --dtype was auto and is bfloat16, --seed was 0 and is 2; repeat"),
    ],
    ids=lambda change: next(iter(change)),
)
def test_resuming_with_another_setting_is_refused(workdir: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(Killed):
        convert(recipe(), reporter=KilledAtLayer(1))
    before = files(workdir / "out.partial")
    with pytest.raises(TransmlaError, match="begun with other weights, settings or versions") as refused:
        convert(recipe(**change), resume=True)
    assert re.search(named, str(refused.value)), refused.value
    assert files(workdir / "out.partial") == before


def test_resuming_with_other_weights_is_refused(workdir: Path, original: Path) -> None:
    Path("source").unlink()
    shutil.copytree(original / "source", "source")
    with pytest.raises(Killed):
        convert(recipe(), reporter=KilledAtLayer(1))
    weights = load_file("source/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(weights, "source/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TransmlaError, match=r"begun with other weights.*; the source's weights changed; repeat"):
        convert(recipe(), resume=True)


def spelled(workdir: Path, source: str = "source", **settings: Any) -> Recipe:
    """Return the recipe with its paths written from the root."""
    absolute = recipe(**settings).model_copy(update={"source": str(workdir / source), "output": str(workdir / "out")})
    calibration = absolute.calibration.model_copy(update={"source": (str(workdir / "text.txt"),)})
    return absolute.model_copy(update={"calibration": calibration})


def test_a_run_resumes_however_its_paths_are_written(workdir: Path, original: Path) -> None:
    with pytest.raises(Killed):
        convert(spelled(workdir), reporter=KilledAtLayer(1))
    convert(recipe(), resume=True)
    assert files(workdir / "out") == files(original / "out")


def test_a_complete_run_resumes_however_its_paths_are_written(
    workdir: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: export.Workspace) -> None:
        self._remove_state()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(export.Workspace, "finish", killed)
        with pytest.raises(Killed):
            convert(spelled(workdir))
    convert(recipe(), resume=True)
    assert not Path("out.partial").exists()


def test_a_source_may_lie_elsewhere_and_a_text_that_was_read_may_be_gone(workdir: Path, original: Path) -> None:
    with pytest.raises(Killed):
        convert(recipe(), reporter=KilledAtLayer(1))
    Path("text.txt").unlink()
    convert(recipe().model_copy(update={"source": str(original / "source")}), resume=True)
    weights = [name for name in files(workdir / "out") if name.endswith(".safetensors")]
    assert all(files(workdir / "out")[name] == files(original / "out")[name] for name in weights)


def test_another_text_of_the_same_name_is_refused(workdir: Path) -> None:
    with pytest.raises(Killed):
        convert(recipe(), reporter=KilledAtLayer(1))
    Path("other").mkdir()
    Path("other/text.txt").write_text("another text " * 1000)
    with pytest.raises(TransmlaError, match=r"; text 1 of --calibration changed; repeat"):
        convert(recipe(calibration={"source": "other/text.txt"}), resume=True)


def test_a_run_of_an_earlier_version_is_refused_as_such(workdir: Path) -> None:
    """Earlier versions saved a key of other values, and not the values."""
    with pytest.raises(Killed):
        convert(recipe(), reporter=KilledAtLayer(1))
    progress = json.loads(Path("out.partial/progress.json").read_text())
    write_state(Path("out.partial/progress.json"), {"key": "0" * 64, "next_layer": progress["next_layer"]})
    says = r"; an earlier version of transmla began it; resume it with that version, or delete the folder$"
    with pytest.raises(TransmlaError, match=says):
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
