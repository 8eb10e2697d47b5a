"""A folder of an unfinished healing is continued only if it is whole, one's own and free, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.interrupted import Killed, files

from transmla import workflow
from transmla.errors import TransmlaError
from transmla.export.manifest import Manifest
from transmla.export.workspace import Workspace
from transmla.files import TEMPORARY
from transmla.heal import loop, resume, run
from transmla.heal.resume import State, Store
from transmla.heal.run import heal
from transmla.heal.settings import Healing
from transmla.recipe import Recipe

Make = Callable[..., Healing]


def paths(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("left", [[f"{TEMPORARY}ab/healing.json"], ["state-00000000/model.safetensors"], []])
def test_the_first_save_may_have_been_killed_anywhere(left: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "healed.partial"
    for name in left:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"half")
    Store(folder).refuse_foreign()


@pytest.mark.parametrize(
    "name", ["state-of-the-art.txt", "best-man.txt", "progress.json", ".hidden", "healing.json.tmp"]
)
def test_a_foreign_folder_is_refused_untouched(name: str, make_healing: Make, tmp_path: Path) -> None:
    (tmp_path / "healed.partial").mkdir()
    (tmp_path / "healed.partial" / name).write_text("mine")
    with pytest.raises(TransmlaError, match="holds no healing to continue"):
        heal(make_healing(), resume=True)
    assert (tmp_path / "healed.partial" / name).read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_folder_is_refused_untouched(kind: str, make_healing: Make, tmp_path: Path) -> None:
    partial = tmp_path / "healed.partial"
    if kind == "link":
        (tmp_path / "mine").mkdir()
        partial.symlink_to(tmp_path / "mine")
    else:
        partial.write_text("mine")
    for resumed in (False, True):
        with pytest.raises(TransmlaError, match=f"healed.partial' is a {kind}"):
            heal(make_healing(), resume=resumed)
    assert partial.is_symlink() == (kind == "link")
    assert not list(tmp_path.glob("mine/*"))


def test_a_second_process_is_refused(make_healing: Make, tmp_path: Path) -> None:
    holder = os.fork()
    if holder == 0:
        try:
            with Workspace(tmp_path / "healed", shards=0) as workspace:
                workspace.hold()
                (tmp_path / "held").touch()
                time.sleep(60)
        finally:
            os._exit(1)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    for resumed in (False, True):
        with pytest.raises(TransmlaError, match="another process is writing"):
            heal(make_healing(), resume=resumed)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)


def dying(*_: Any, **__: Any) -> None:
    raise Killed


def test_a_healing_killed_after_its_renaming_leaves_nothing(
    make_healing: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_healing(max_tokens=32 * 8 * 2, save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(run, "remove_folder", dying)
        with pytest.raises(Killed):
            heal(settings)
    healed = files(tmp_path / "healed")
    kept = shutil.copytree(tmp_path / "healed.partial", tmp_path / "kept")
    with pytest.raises(TransmlaError, match="is not empty"):
        heal(settings)
    assert heal(settings, resume=True) == tmp_path / "healed"
    assert not (tmp_path / "healed.partial").exists()
    # An empty folder, of which everything else was deleted; and the folder of another healing, which stays.
    (tmp_path / "healed.partial").mkdir()
    assert Store(tmp_path / "healed.partial").remove_finished(tmp_path / "healed")
    state = json.loads((kept / resume.FILE).read_text())
    (kept / resume.FILE).write_text(json.dumps(state | {"curve": []}))
    kept.rename(tmp_path / "healed.partial")
    before = paths(tmp_path)
    with pytest.raises(TransmlaError, match="is not empty"):
        heal(settings, resume=True)
    assert paths(tmp_path) == before
    assert files(tmp_path / "healed") == healed


def test_a_conversion_killed_after_its_healing_leaves_nothing(pair: tuple[Path, Path], make_recipe: Any) -> None:
    recipe: Recipe = make_recipe(pair[0], output="healed")
    healed, unhealed = Path(recipe.output), Path(recipe.output).with_name("healed.unhealed")
    shutil.copytree(pair[1], unhealed)
    shutil.copytree(pair[1], healed)
    with pytest.raises(TransmlaError, match="is not empty"):  # no healing is finished
        workflow.convert_and_heal(recipe, resume=True)
    kl = {"before": 1.0, "after": 0.5}
    record = {
        "settings": {"teacher": "t", "data": [], "trainable": "all"},
        "tokens": 1,
        "seconds": 1,
        "held_out_kl": kl,
    }
    manifest = json.loads((healed / "transmla.json").read_text())
    (healed / "transmla.json").write_text(json.dumps(manifest | {"healing": [record]}))
    (unhealed / "config.json").unlink()  # half deleted
    assert workflow.convert_and_heal(recipe, resume=True) == healed
    assert not unhealed.exists()
    assert Manifest.read(healed).healing


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(State("key", step=4, best_kl=0.5, best_step=2), {})
    assert store.read("key") == State("key", step=4, best_kl=0.5, best_step=2)
    file = tmp_path / resume.FILE
    file.write_text(file.read_text().replace("0.5", "0.4"))
    with pytest.raises(TransmlaError, match=r"healing.json' is damaged"):
        store.read("key")
    file.write_text(file.read_text()[:20])
    with pytest.raises(TransmlaError, match=r"healing.json' is damaged"):
        store.read("key")


@pytest.mark.parametrize("first", [True, False])
def test_a_held_out_kl_that_is_nan_is_never_recorded(
    first: bool, make_healing: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = loop.Loop.held_out_kl, iter(range(100))
    monkeypatch.setattr(
        loop.Loop,
        "held_out_kl",
        lambda self: float("nan") if (next(calls) == 0) == first else measure(self),
    )
    if first:
        with pytest.raises(TransmlaError, match="NaN or infinite before the first step"):
            heal(make_healing())
    else:
        bad = iter([False, True])
        monkeypatch.setattr(loop.Loop, "held_out_kl", lambda self: float("nan") if next(bad, False) else measure(self))
        healed = heal(make_healing(max_tokens=32 * 8 * 2, eval_every=1, save_every=1))
        record = Manifest.read(healed).healing[-1]
        assert record["rollbacks"] == 1
        json.dumps(record, allow_nan=False)
