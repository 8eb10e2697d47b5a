"""The runs that ``faults_kills.py`` kills: conversions and healings of a tiny random model."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from helpers.tiny_sources import SMALL_HEALING, build_model, build_tokenizer

from transmla.convert import pipeline, shard_writer
from transmla.heal import loop, write_export
from transmla.heal.run import heal
from transmla.heal.settings import Healing
from transmla.plan.fit_settings import FITS
from transmla.recipe import parse_recipe


@dataclass
class Job:
    """A kind of run, and what its unbroken run showed.

    Attributes:
        name: what is run.
        work: runs it in the working folder; the argument is whether it resumes.
        events: number of file events of the unbroken run.
        seconds: its duration.
        bytes: its files, by relative path.
    """

    name: str
    work: Callable[[bool], object]
    events: int = 0
    seconds: float = 0.0
    bytes: dict[str, bytes] = field(default_factory=dict)


def jobs() -> list[Job]:
    """Return every kind of run: both fits, both formats, and healings of both."""
    return [
        *(
            Job(f"convert, {fit}, {form}", lambda resume, fit=fit, form=form: _convert(fit, form, resume))
            for fit in ("off", "fast")
            for form in ("native", "transmla")
        ),
        *(Job(f"heal, {form}", lambda resume, form=form: _heal(form, resume)) for form in ("native", "transmla")),
    ]


def _convert(fit: str, form: str, resume: bool, output: str = "out") -> None:
    calibration = {"source": "text.txt", "sequences": 4, "length": 32}
    values = {"source": "source", "output": output, "calibration": calibration, "device": "cpu", "cache_ratio": 0.5}
    pipeline.convert(parse_recipe(values | {"reconstruct": fit, "format": form}, "kills"), resume=resume)


def _heal(form: str, resume: bool) -> None:
    sizes = SMALL_HEALING | {"max_tokens": 32 * 8 * 4, "eval_every": 2, "save_every": 2}
    named = {"student": f"student-{form}", "teacher": "source", "output": "out", "data": ("text.txt",)}
    heal(Healing(**{**sizes, **named, "device": "cpu"}), resume=resume)


def prepare(folder: Path, *, heals: bool) -> None:
    """Write a source, its text and its exports into ``folder``, and import what runs import on the way.

    Args:
        folder: an empty folder, which becomes the working folder.
        heals: whether there will be healings.
    """
    from accelerate.state import AcceleratorState

    build_model(num_hidden_layers=3).save_pretrained(folder / "source")
    build_tokenizer(folder / "source")
    letters = torch.randint(0, 26, (4000,), generator=torch.Generator().manual_seed(1))
    (folder / "text.txt").write_text(" ".join(chr(97 + int(i)) for i in letters))
    os.chdir(folder)
    for form in ("native", "transmla"):
        _convert("off", form, False, f"student-{form}")
    if heals:
        _heal("native", False)
        shutil.rmtree("out")
        AcceleratorState._reset_state(True)
    gc.collect()
    gc.freeze()  # the forked processes need not look at the objects of this one again


def shorten() -> None:
    """Make the runs of this process short, without changing what they write and when."""
    shard_writer.SAVE_SECONDS = 0.0
    # The manifest records seconds: without a clock, equal runs write equal bytes.
    loop.time = SimpleNamespace(monotonic=lambda: 0.0)  # type: ignore[assignment]
    write_export.write_curve = lambda curve, file: file.write_bytes(repr(curve).encode() * 20)
    FITS["fast"] = replace(FITS["fast"], steps=12)
