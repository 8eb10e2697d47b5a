"""State of a healing on disk, and the key that a resumed run must share with the run that it continues."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from transmla.boundary import boundary, read_json_object
from transmla.errors import TransmlaError
from transmla.export.hashes import MANIFEST
from transmla.export.manifest import Manifest
from transmla.export.state import flags, read_state, write_state
from transmla.export.unfinished import foreign
from transmla.files import is_temporary, remove_folder, write_tensors
from transmla.heal.learning_rate import highest_rate
from transmla.heal.settings import Healing

FILE = "healing.json"
# What a resumed healing must have in common with the run that it continues.
STARTED_WITH = "started with another student, teacher, text, settings, version or kind of processes"
_STATES = re.compile(r"state-\d{8}|best-\d{8}\.safetensors")
# Settings that a resumed run may change. Models and texts are identified by hashes of their contents instead.
_FREE = {"output", "track", "save_every", "student", "teacher", "revision", "allow_pickle", "data", "split", "column"}


@dataclass
class State:
    """Progress of a run, saved as ``healing.json``.

    Attributes:
        key: hash of everything that a resumed run must share.
        facts: what ``key`` is the hash of (``run_facts``); empty in folders of older versions.
        step: finished steps.
        seconds: training time so far.
        slowed: factor of the learning rate, halved by each rollback.
        rollbacks: returns to a saved state after a NaN or infinite loss.
        best_kl: lowest held-out KL so far, in nats per position; None before the first evaluation.
        best_step: step of that evaluation.
        evaluations_without_gain: evaluations since then.
        curve: one point per evaluation.
        losses: loss of each step since the last evaluation.
    """

    key: str
    facts: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    slowed: float = 1.0
    rollbacks: int = 0
    best_kl: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def run_facts(settings: Healing, student: str, teacher: str, text: str, kind: str) -> dict[str, Any]:
    """Return everything that a resumed run must share with the run that it continues, by the name that a user reads.

    Args:
        settings: the settings; those in ``_FREE`` do not count.
        student: fingerprint of the export.
        teacher: fingerprint of the teacher's weights.
        text: fingerprint of all tokens.
        kind: precision and sharding (``distributed.kind``).
    """
    models = {"the student's files": student, "the teacher's weights": teacher, "the text": text}
    return flags(settings.model_dump(mode="json", exclude=_FREE)) | models | {"the kind of processes": kind}


class Store:
    """Folder ``OUTPUT.partial``: accelerate's states, the best weights, and ``healing.json``, which points to both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str, facts: Mapping[str, Any] | None = None) -> State | None:
        """Return the saved state, or None if there is none.

        Args:
            key: the key of this run.
            facts: what it is the hash of; without them, a refusal names no differences.

        Raises:
            TransmlaError: if the saved state has another ``key``, or is damaged.
        """
        if not (self.folder / FILE).is_file():
            return None
        names = {item.name for item in fields(State)}
        return State(**read_state(self.folder / FILE, key, names, begun_with=STARTED_WITH, facts=facts))

    def states(self, step: int) -> Path:
        """Return the folder in which accelerate saves model, optimiser and random states of ``step``."""
        return self.folder / f"state-{step:08d}"

    def save(self, state: State, best: dict[str, Tensor] | None) -> None:
        """Write ``healing.json`` and, if new, the ``best`` weights; then delete the states of other steps.

        Accelerate's states of ``state.step`` must have been written before.
        """
        file = self._best(state)
        if best is not None and not file.is_file():
            write_tensors(file, best)
        write_state(self.folder / FILE, asdict(state))
        for old in self.folder.glob("state-*"):
            if old != self.states(state.step):
                shutil.rmtree(old)
        for older in self.folder.glob("best-*"):
            if older != file:
                older.unlink()

    def best(self, state: State) -> dict[str, Tensor]:
        """Return the best weights of ``state`` by name, in natural coordinates.

        Raises:
            TransmlaError: if their file is missing or damaged.
        """
        from safetensors.torch import load_file

        file = self._best(state)
        if not file.is_file():
            raise TransmlaError(
                f"'{file}' is missing",
                limit="it holds the best weights so far",
                remedy=f"delete '{self.folder}' and start again",
            )
        with boundary(f"'{file}' is damaged", remedy=f"delete '{self.folder}' and start again"):
            return load_file(file)

    def _best(self, state: State) -> Path:
        return self.folder / f"best-{state.best_step:08d}.safetensors"

    def refuse_foreign(self) -> None:
        """Refuse a folder that holds something other than a healing, because healing would delete the folder.

        Raises:
            TransmlaError: if the folder is not empty and holds no healing.
        """
        if not self.folder.exists() or (self.folder / FILE).is_file():
            return
        # A run that was killed during its first save has states, but no `healing.json` yet.
        paths = [path for path in self.folder.iterdir() if not is_temporary(path)]
        if any(path.is_symlink() or not _STATES.fullmatch(path.name) for path in paths):
            raise foreign(self.folder, "healing")

    def remove_finished(self, output: Path) -> bool:
        """Delete the folder if ``output`` is the finished export of its healing; return whether it was.

        A run that was killed after it had given the export its name leaves such a folder.
        """
        if self.folder.is_symlink() or not self.folder.is_dir() or not (output / MANIFEST).is_file():
            return False
        curve, healing = (read_json_object(self.folder / FILE) or {}).get("curve"), Manifest.read(output).healing
        finished = not any(self.folder.iterdir()) or (bool(healing) and healing[-1].get("curve") == curve)
        if finished:
            remove_folder(self.folder, last=FILE)
        return finished


def summary(state: State, settings: Healing) -> dict[str, Any]:
    """Return the manifest's record of a healing, without the curve."""
    return {
        "settings": settings.model_dump(mode="json", exclude={"output", "track"}),
        "steps": state.step,
        "tokens": state.step * settings.batch * settings.length,
        "seconds": round(state.seconds, 1),
        "best_step": state.best_step,
        "held_out_kl": {"before": state.curve[0]["held_out_kl"], "after": state.best_kl},
        "learning_rate": highest_rate(settings, state.curve[0]["held_out_kl"]),
        "rollbacks": state.rollbacks,
    }
