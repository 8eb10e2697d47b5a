"""Read and write the manifest of an export, ``transmla.json``: its source, settings, measurements and file hashes."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transmla import __version__
from transmla.artifacts import Plan
from transmla.errors import TransmlaError
from transmla.export.hashes import MANIFEST, finished_hashes
from transmla.export.signature import Signature
from transmla.export.travel import manifest_of_resaved
from transmla.files import write_json


@dataclass(frozen=True)
class SourceRecord:
    """The source of a conversion.

    Attributes:
        name: the source as the recipe names it; of a local path, the last part.
        revision: Hub revision in the recipe.
        commit: Hub commit of the downloaded source; None for a local source.
        fingerprint: SHA-256 over all tensors, in hex.
        card: metadata of the source's card that the export's card repeats, such as its licence.
    """

    name: str
    revision: str | None
    commit: str | None
    fingerprint: str
    card: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FitRecord:
    """The settings of the fit of every layer.

    Attributes:
        steps: number of Adam steps.
        tokens: tokens in a step.
        rate: peak learning rate.
        through_mlp: whether the loss is measured after the MLP, instead of after the attention.
        window: number of consecutive layers that are fitted together.
    """

    steps: int
    tokens: int
    rate: float
    through_mlp: bool
    window: int


@dataclass(frozen=True)
class Promise:
    """The KL to the source that a conversion was asked to keep, in nats per token, before any healing.

    Attributes:
        accepted: the largest KL that the recipe accepts.
        expected: KL on the held-out text on which the cache was chosen.
        measured: KL of the written layers on other held-out text, which chose nothing.
    """

    accepted: float
    expected: float
    measured: float


@dataclass(frozen=True)
class Manifest:
    """The record of how an export was made.

    Attributes:
        format: name of the export's format.
        plan: plan of the conversion.
        source: source of the conversion.
        reconstruct: the recipe's fit: ``off``, ``fast`` or ``full``.
        versions: software versions, by name.
        layers: one record for each layer, with its index, errors and norms.
        final_norm_correction: factor on the weight of the model's last norm.
        hashes: SHA-256 of every file in hex, by relative path.
        recipe: hash of the recipe's settings, which a resumed run compares; empty in older exports.
        fit: settings of the fit; None if the layers were not fitted.
        texts: shares of the calibration texts by name; empty if the caller gave tokens.
        healing: one record for each healing, oldest first.
        signature: what the export computes and contains; None in older exports.
        weights: ``travel.weights_fingerprint`` of the export as transmla wrote it; empty in older exports.
        resaved: whether other software has written the files anew.
        weights_changed: whether it has changed the weights.
        promise: the loss that chose the cache; None if the recipe gave a size.
    """

    format: str
    plan: Plan
    source: SourceRecord
    reconstruct: str
    versions: dict[str, str]
    layers: list[dict[str, Any]]
    final_norm_correction: float
    hashes: dict[str, str]
    recipe: str = ""
    fit: FitRecord | None = None
    texts: dict[str, float] = field(default_factory=dict)
    healing: list[dict[str, Any]] = field(default_factory=list)
    signature: Signature | None = None
    weights: str = ""
    resaved: bool = False
    weights_changed: bool = False
    promise: Promise | None = None

    @property
    def converted_plan(self) -> Plan:
        """The plan with the rotary slots that the conversion has chosen for each layer, if it has."""
        slots = tuple(tuple(record.get("slots", ())) for record in self.layers)
        return replace(self.plan, layer_slots=slots) if any(slots) else self.plan

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as plain values."""
        return asdict(self) | {"plan": self.plan.to_dict()}

    def write(self, folder: Path) -> None:
        """Write the manifest into the export's ``folder``."""
        write_json(folder / MANIFEST, self.to_dict())

    @classmethod
    def read(cls, folder: Path, *, unnamed: bool = False) -> Manifest:
        """Read the manifest of the finished export in ``folder``, which other software may have saved again.

        Args:
            folder: folder of the export.
            unnamed: whether the folder may still have the name of an unfinished run.

        Raises:
            TransmlaError: if the export is missing or unfinished, or if the manifest has another structure.
        """
        from pydantic import ValidationError

        values = None if (folder / MANIFEST).is_file() else manifest_of_resaved(folder)
        if values is None:
            finished_hashes(folder, unnamed=unnamed)
            values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        try:
            manifest: Manifest = _reader().validate_python(values)
            mistake = _mistake(manifest)
        except ValidationError as error:
            first = error.errors()[0]
            mistake = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        if mistake:
            raise TransmlaError(
                f"{MANIFEST} does not describe a conversion", limit=mistake, remedy="run `transmla convert` again"
            )
        return manifest


# What readers of a manifest rely on in its untyped records: key → type.
_LAYER = {"layer": int, "relative_error": float}
_HEALING = {"settings": dict, "tokens": int, "seconds": (int, float), "held_out_kl": dict}
_HEALING_SETTINGS = {"teacher": str, "data": list, "trainable": str}
_HEALING_KL = {"before": (int, float), "after": (int, float)}


def _mistake(manifest: Manifest) -> str:
    """Name the first thing that types do not check and that is wrong; empty if nothing is."""
    plan = manifest.plan
    if plan.format != manifest.format:
        return f"format is {manifest.format}, plan.format {plan.format}"
    if plan.dtype not in ("bfloat16", "float32"):
        return f"plan.dtype is '{plan.dtype}', not bfloat16 or float32"
    if plan.spec.cache_values <= 0 or not manifest.layers:
        return "plan.spec caches nothing" if manifest.layers else "layers is empty"
    if "transmla" not in manifest.versions:
        return "versions.transmla is missing"
    for i, layer in enumerate(manifest.layers):
        if mistake := _wrong_key(layer, _LAYER):
            return f"layers.{i}.{mistake}"
    for i, record in enumerate(manifest.healing):
        mistake = _wrong_key(record, _HEALING)
        mistake = mistake or _wrong_key(record["settings"], _HEALING_SETTINGS, "settings.")
        if not mistake and not all(isinstance(name, str) for name in record["settings"]["data"]):
            mistake = "settings.data holds other things than names"
        mistake = mistake or _wrong_key(record["held_out_kl"], _HEALING_KL, "held_out_kl.")
        if mistake:
            return f"healing.{i}.{mistake}"
    return ""


def _wrong_key(record: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> str:
    """The first key of ``expected`` that is missing from ``record`` or has another type; empty if all are right."""
    wrong = (key for key, kind in expected.items() if not isinstance(record.get(key), kind))
    return next((f"{prefix}{key} is missing or has the wrong type" for key in wrong), "")


@cache
def _reader() -> Any:
    """Return the validator that checks the types of a manifest read from JSON."""
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


def versions() -> dict[str, str]:
    """Return the versions of the software that determines the output of a conversion, by name."""
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"transmla": __version__, **libraries, "python": platform.python_version()}
