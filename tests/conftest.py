"""Fixtures of all tests: tiny sources on disk, and recipes and healing settings for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import cached_assets_path

if not torch.cuda.is_available():  # Triton reads this variable when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

from helpers.tiny_sources import SMALL_HEALING, build_model, build_tokenizer

from transmla.heal.settings import Healing
from transmla.recipe import Recipe, parse_recipe

# More threads do not speed up tiny matrices, and slow them down when the other cores are busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def local_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cache samples of models in a folder of this run, and make the text ``auto`` without a Hub."""
    folder = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.cached_assets_path", partial(cached_assets_path, assets_dir=folder))
        patch.setattr("transmla.source.mixture.hub_is_reachable", lambda: False)
        yield


@pytest.fixture
def assets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that caches samples of models, new for this test."""
    folder = tmp_path_factory.mktemp("assets")
    monkeypatch.setattr("huggingface_hub.cached_assets_path", partial(cached_assets_path, assets_dir=folder))
    return folder


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., Path]:
    """A function ``make_source(family, layout, rope, **config)`` that saves a tiny model with its tokenizer.

    The function returns the model's folder.
    """

    def make(*args: Any, dtype: torch.dtype = torch.float32, name: str = "source", **kwargs: Any) -> Path:
        folder = tmp_path / name
        model = build_model(*args, **kwargs)
        model.to(dtype).save_pretrained(folder)
        build_tokenizer(folder, model.config.vocab_size)
        return folder

    return make


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text file of 4,000 random words from a list of 15."""
    file = tmp_path / "text.txt"
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
def make_recipe(tmp_path: Path, text_file: Path) -> Callable[..., Recipe]:
    """A function ``make_recipe(source, **settings)`` with little calibration text, and without a fit by default."""

    def make(source: Path, output: str = "out", **settings: Any) -> Recipe:
        calibration = {
            "source": str(text_file),
            "sequences": 8,
            "length": 48,
            **settings.pop("calibration", {}),
        }
        values = {
            "source": str(source),
            "output": str(tmp_path / output),
            "reconstruct": "off",
            "calibration": calibration,
            "device": "cpu",
        }
        return parse_recipe(values | settings, "test")

    return make


@pytest.fixture
def pair(make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]) -> tuple[Path, Path]:
    """The folders of a source and of its export with half the cache."""
    from transmla.convert.pipeline import convert

    source = make_source()
    return source, convert(make_recipe(source, cache_ratio=0.5))


@pytest.fixture
def make_healing(pair: tuple[Path, Path], text_file: Path, tmp_path: Path) -> Callable[..., Healing]:
    """A function that returns the settings of a short healing of ``pair``, with the given changes."""

    def make(**changes: Any) -> Healing:
        named = {"student": str(pair[1]), "teacher": str(pair[0]), "output": str(tmp_path / "healed")}
        return Healing(**{**named, "data": (str(text_file),), **SMALL_HEALING, **changes})

    return make
