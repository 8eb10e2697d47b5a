"""A manifest that was edited or is broken is refused in one line, before anything is built on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transmla.errors import TransmlaError
from transmla.export.manifest import Manifest

RECORD = {
    "settings": {"teacher": "t", "data": ["self"], "trainable": "attention"},
    "tokens": 1,
    "seconds": 1.0,
    "held_out_kl": {"before": 0.2, "after": 0.1},
}
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no plan": (lambda m: m.pop("plan"), "plan: field required"),
    "no spec": (lambda m: m["plan"].pop("spec"), "plan.spec: field required"),
    "two formats": (lambda m: m.update(format="transmla"), "format is transmla, plan.format native"),
    "odd dtype": (lambda m: m["plan"].update(dtype="nonsense"), "plan.dtype is 'nonsense'"),
    "no layers": (lambda m: m.update(layers=[]), "layers is empty"),
    "layer without error": (lambda m: m["layers"][1].pop("relative_error"), "layers.1.relative_error is missing"),
    "no heads": (lambda m: m["plan"]["spec"].update(num_key_value_heads=0), "plan.spec caches nothing"),
    "no version": (lambda m: m.update(versions={}), "versions.transmla is missing"),
    "empty healing": (lambda m: m.update(healing=[{}]), "healing.0.settings is missing"),
    "healing without teacher": (
        lambda m: m.update(healing=[RECORD | {"settings": {"data": ["self"], "trainable": "all"}}]),
        "healing.0.settings.teacher is missing",
    ),
    "healing without KL": (
        lambda m: m.update(healing=[RECORD | {"held_out_kl": {"before": 0.2}}]),
        "healing.0.held_out_kl.after is missing",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_manifest_is_refused_in_one_line(name: str, pair: tuple[Path, Path]) -> None:
    break_it, message = BROKEN[name]
    file = pair[1] / "transmla.json"
    manifest = json.loads(file.read_text())
    break_it(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(TransmlaError) as refused:
        Manifest.read(pair[1])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_manifest_survives_being_written_and_read(pair: tuple[Path, Path]) -> None:
    manifest = Manifest.read(pair[1])
    before = (pair[1] / "transmla.json").read_bytes()
    manifest.write(pair[1])
    assert (pair[1] / "transmla.json").read_bytes() == before
