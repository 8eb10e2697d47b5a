"""The estimate of a healing's disk space, against what lies in its folders while it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from transmla.export.manifest import Manifest
from transmla.heal.choose import disk_bytes
from transmla.heal.resume import State, Store
from transmla.heal.run import heal
from transmla.heal.settings import Healing


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("trainable", ["all", "attention"])
def test_a_healing_takes_no_more_disk_than_estimated(
    make_healing: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch, trainable: str
) -> None:
    peak, save = 0, Store.save

    def measured(store: Store, state: State, best: dict[str, Tensor] | None) -> None:
        nonlocal peak
        # The older state and the older best weights are still there.
        coming = 0 if best is None else sum(tensor.nbytes for tensor in best.values())
        peak = max(peak, size(store.folder) + coming)
        save(store, state, best)

    monkeypatch.setattr(Store, "save", measured)
    settings = make_healing(trainable=trainable, save_every=2)
    export = Manifest.read(Path(settings.student)).plan
    weights = sum(file.stat().st_size for file in Path(settings.student).glob("*.safetensors"))
    heal(settings)
    # Random states and JSON files of a tiny model add some hundred kilobytes.
    assert 0.5 * disk_bytes(export, trainable) < peak + weights < disk_bytes(export, trainable) + 500_000
