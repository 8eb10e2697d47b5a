"""The manifest of an export, ``transmla.json``: what it was made from, how, and what it measured on the way."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transmla import __version__
from transmla.artifacts import Plan
from transmla.errors import TransmlaError
from transmla.export.files import write_json
from transmla.export.hashes import MANIFEST, finished_hashes


@dataclass(frozen=True)
class SourceRecord:
    """The source of a conversion: its name as given, Hub revision and commit, and the hash of all its tensors."""

    name: str
    revision: str | None
    commit: str | None
    fingerprint: str


@dataclass(frozen=True)
class FitRecord:
    """How every layer was fitted: steps of Adam, tokens in a step, highest learning rate, and layers at once."""

    steps: int
    tokens: int
    rate: float
    through_mlp: bool
    window: int


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of an export.

    Attributes:
        format: name of the export's format.
        plan: that the conversion followed.
        source: that it read.
        reconstruct: name of the fit: ``off``, ``fast`` or ``full``.
        fit: its settings; None if layers were not fitted.
        versions: of the software that wrote the export.
        layers: for each layer its index, errors and norms.
        final_norm_correction: factor on the last norm's weight.
        hashes: SHA-256 in hex by relative path.
        healing: one record for each distillation, oldest first.
    """

    format: str
    plan: Plan
    source: SourceRecord
    reconstruct: str
    versions: dict[str, str]
    layers: list[dict[str, Any]]
    final_norm_correction: float
    hashes: dict[str, str]
    fit: FitRecord | None = None
    healing: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder``."""
        write_json(folder / MANIFEST, asdict(self) | {"plan": self.plan.to_dict()})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of the finished export in ``folder``.

        Raises:
            TransmlaError: if there is none, or if it does not describe a conversion.
        """
        from pydantic import ValidationError

        finished_hashes(folder)
        try:
            manifest: Manifest = _reader().validate_python(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        except ValidationError as error:
            mistake = error.errors()[0]
            raise TransmlaError(
                f"{MANIFEST} does not describe a conversion",
                limit=f"{'.'.join(map(str, mistake['loc']))}: {mistake['msg'].lower()}",
                remedy="run `transmla convert` again",
            ) from error
        return manifest


@cache
def _reader() -> Any:
    """Checks the types of a manifest that was read from JSON."""
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


def versions() -> dict[str, str]:
    """Versions of the software that decides what a conversion writes."""
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"transmla": __version__, **libraries, "python": platform.python_version()}
