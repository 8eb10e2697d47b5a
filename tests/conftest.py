"""Fixtures of all tests: tiny sources on disk, and recipes and healing settings for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import cached_assets_path

if not torch.cuda.is_available():  # Triton reads this variable when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

from helpers.command_line import Run
from helpers.tiny_sources import SMALL_HEALING, build_model, build_tokenizer

from transmla import cli
from transmla.heal.settings import Healing
from transmla.plan.fit_settings import FITS
from transmla.recipe import Recipe, parse_recipe

# More threads do not speed up tiny matrices, and slow them down when the other cores are busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def local_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cache samples of models in a folder of this run, and make the text ``auto`` without a Hub.

    Processes that tests start inherit the folder, so that nothing is written into the user's cache.
    """
    folder = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ASSETS_CACHE", str(folder))
        patch.setattr("huggingface_hub.cached_assets_path", partial(cached_assets_path, assets_dir=folder))
        patch.setattr("transmla.source.mixture.hub_is_reachable", lambda: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def short_fits() -> Iterator[None]:
    """Fit layers in a fifth of the steps. Tests that judge a fit set the number of steps themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FITS, "fast", replace(FITS["fast"], steps=FITS["fast"].steps // 5))
        yield


@pytest.fixture
def assets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that caches samples of models, new for this test."""
    folder = tmp_path_factory.mktemp("assets")
    monkeypatch.setattr("huggingface_hub.cached_assets_path", partial(cached_assets_path, assets_dir=folder))
    return folder


def save_source(folder: Path, *args: Any, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Save a tiny model with its tokenizer into ``folder``, and return ``folder``."""
    model = build_model(*args, **config)
    model.to(dtype).save_pretrained(folder)
    build_tokenizer(folder, model.config.vocab_size)
    return folder


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., Path]:
    """A function ``make_source(family, layout, rope, **config)`` that saves a tiny model with its tokenizer.

    The function returns the model's folder.
    """
    return lambda *args, name="source", **settings: save_source(tmp_path / name, *args, **settings)


def write_text(file: Path) -> Path:
    """Write 4,000 random words from a list of 15 into ``file``, and return ``file``."""
    words = [
        "the",
        "cat",
        "dog",
        "sat",
        "on",
        "a",
        "mat",
        "log",
        "ran",
        "far",
        "and",
        "saw",
        "big",
        "red",
        "sun",
    ]
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(0, len(words), (4000,), generator=generator)
    file.write_text(" ".join(words[i] for i in picks))
    return file


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text file of 4,000 random words."""
    return write_text(tmp_path / "text.txt")


def build_recipe(source: Path, output: Path, text: Path, **settings: Any) -> Recipe:
    """Return a recipe with little calibration text, and without a fit by default."""
    calibration = {"source": str(text), "sequences": 8, "length": 48, **settings.pop("calibration", {})}
    named = {"source": str(source), "output": str(output), "calibration": calibration}
    return parse_recipe(named | {"reconstruct": "off", "device": "cpu"} | settings, "test")


@pytest.fixture
def make_recipe(tmp_path: Path, text_file: Path) -> Callable[..., Recipe]:
    """A function ``make_recipe(source, **settings)`` with little calibration text, and without a fit by default."""
    return lambda source, output="out", **settings: build_recipe(source, tmp_path / output, text_file, **settings)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny ``source`` and its export ``out`` with half the cache; tests copy it before a change."""
    from transmla.convert.pipeline import convert

    folder = tmp_path_factory.mktemp("converted")
    save_source(folder / "source")
    convert(build_recipe(folder / "source", folder / "out", write_text(folder / "text.txt"), cache_ratio=0.5))
    return folder


@pytest.fixture
def pair(converted: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The folders of a source and of its export with half the cache, copied for this test."""
    source, export = (Path(shutil.copytree(converted / name, tmp_path / name)) for name in ("source", "out"))
    return source, export


@pytest.fixture
def make_healing(pair: tuple[Path, Path], text_file: Path, tmp_path: Path) -> Callable[..., Healing]:
    """A function that returns the settings of a short healing of ``pair``, with the given changes."""

    def make(**changes: Any) -> Healing:
        named = {"student": str(pair[1]), "teacher": str(pair[0]), "output": str(tmp_path / "healed")}
        return Healing(**{**named, "data": (str(text_file),), **SMALL_HEALING, **changes})

    return make


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("plan", "source", …)`` → (exit code, stdout, stderr), in this process."""

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["transmla", *argv])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return call
