"""Where a healing stands: what a resumed run goes on from, and what it must share with the one it continues."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from transmla.errors import TransmlaError
from transmla.export.files import write_json, write_tensors
from transmla.export.hashes import read_json
from transmla.heal.optimiser import highest_rate
from transmla.heal.settings import Healing

FILE = "healing.json"
# What may differ between a run and the one that continues it; models and texts are told by what is in them.
_FREE = {"output", "track", "save_every", "student", "teacher", "revision", "data", "split", "column"}


@dataclass
class State:
    """Steps and seconds done, the curve, and the best look at what was kept aside."""

    key: str
    step: int = 0
    seconds: float = 0.0
    # What the rates were lowered by, and how often, after losses that were no numbers.
    slowed: float = 1.0
    rollbacks: int = 0
    best_kl: float | None = None
    best_step: int = 0
    looks_without_gain: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    # Of the steps since the last look.
    losses: list[float] = field(default_factory=list)


def run_key(settings: Healing, student: str, teacher: str, text: str, kind: str) -> str:
    """What two parts of one run have in common: settings, fingerprints of models and text, and the processes' kind."""
    chosen = settings.model_dump(mode="json", exclude=_FREE)
    return hashlib.sha256(json.dumps([chosen, student, teacher, text, kind], sort_keys=True).encode()).hexdigest()


class Store:
    """``OUTPUT.partial``: states of accelerate, the best weights so far, and ``healing.json`` that points to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> State | None:
        """The state of the run that was begun here, if there is one.

        Raises:
            TransmlaError: if it was another run.
        """
        values = read_json(self.folder / FILE)
        if values is None:
            return None
        if values.get("key") != key:
            raise TransmlaError(
                f"'{self.folder}' was begun with another student, teacher, text, settings or kind of processes",
                limit="a resumed healing must learn what the unbroken one would have",
                remedy="repeat the command it was begun with, or delete it",
            )
        return State(**values)

    def states(self, step: int) -> Path:
        """Where accelerate keeps model, optimiser and random states of ``step``."""
        return self.folder / f"state-{step:08d}"

    def save(self, state: State, best: dict[str, Tensor] | None) -> None:
        """Point to ``state``, whose ``states`` are written; drop those of other steps."""
        file = self._best(state)
        if best is not None and not file.is_file():
            write_tensors(file, best)
        write_json(self.folder / FILE, asdict(state))
        for old in self.folder.glob("state-*"):
            if old != self.states(state.step):
                shutil.rmtree(old)
        for older in self.folder.glob("best-*"):
            if older != file:
                older.unlink()

    def best(self, state: State) -> dict[str, Tensor]:
        """The best weights of ``state``, in natural coordinates.

        Raises:
            TransmlaError: if they are gone.
        """
        from safetensors.torch import load_file

        file = self._best(state)
        if not file.is_file():
            raise TransmlaError(
                f"'{file}' is gone",
                limit="it holds the best weights so far",
                remedy=f"delete '{self.folder}' and begin again",
            )
        return load_file(file)

    def _best(self, state: State) -> Path:
        return self.folder / f"best-{state.best_step:08d}.safetensors"

    def refuse_foreign(self) -> None:
        """Refuse to continue, and so to clear away, what is no healing.

        Raises:
            TransmlaError: if the folder holds something, and no healing.
        """
        # One that died in its first save has no pointer yet.
        foreign = self.folder.is_dir() and any(
            not file.name.startswith(("state-", "best-")) for file in self.folder.iterdir()
        )
        if foreign and not (self.folder / FILE).is_file():
            raise TransmlaError(
                f"'{self.folder}' holds no healing to continue",
                limit="something else was begun there",
                remedy="choose another --output, or delete it",
            )


def summary(state: State, settings: Healing) -> dict[str, Any]:
    """What the manifest says of a healing."""
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
