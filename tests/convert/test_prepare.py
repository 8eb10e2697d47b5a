"""``plan``, ``inspect`` and ``convert`` make the same decisions from the same recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transmla.convert.inspect import inspect_source
from transmla.convert.pipeline import convert
from transmla.convert.prepare import prepare, summarise
from transmla.errors import TransmlaError
from transmla.export.manifest import Manifest
from transmla.recipe import Recipe
from transmla.reporter import Silent

# (family, recipe settings): ten cases that vary everything that the shape depends on.
RECIPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"reconstruct": "off"}),
    ("llama", {"reconstruct": "fast", "cache_ratio": 0.25}),
    ("llama", {"reconstruct": "auto", "calibration": {"sequences": 1}}),
    ("llama", {"reconstruct": "auto", "method": "care"}),
    ("llama", {"reconstruct": "fast", "kv_lora_rank": 24, "qk_rope_head_dim": 8}),
    ("llama", {"reconstruct": "auto", "format": "transmla", "layers": "1-2"}),
    ("qwen3", {"reconstruct": "fast"}),
    ("gemma3_text", {"reconstruct": "auto", "cache_ratio": 0.34}),
    ("smollm3", {"reconstruct": "off", "cache_ratio": 1 / 3}),
]


@pytest.mark.parametrize(("family", "settings"), RECIPES, ids=map(str, range(len(RECIPES))))
def test_plan_inspect_and_convert_agree_on_the_shape(
    family: str, settings: dict[str, Any], make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]} if "gemma" in family else {}
    layers |= {"no_rope_layers": [1, 0, 1]} if family == "smollm3" else {}
    # Configs of Gemma 3 have one rotary table for each kind of layer; None takes their defaults.
    layers |= {"rope_parameters": None} if "gemma" in family else {}
    recipe = make_recipe(make_source(family, num_hidden_layers=3, **layers), **settings)
    prepared = prepare(recipe)
    planned, inspected = summarise(prepared), inspect_source(recipe, Silent())
    folder = convert(recipe)
    manifest = Manifest.read(folder)
    assert manifest.plan == prepared.plan
    assert planned["shape"] == json.loads((folder / "transmla.json").read_text())["plan"]["shape"]
    assert manifest.plan.shape in [plan.shape for plan in inspected.plans.values()]
    assert manifest.plan in inspected.plans.values()
    assert (manifest.fit is None) == (planned["reconstruct"] == "off")


def test_the_manifest_records_the_settings_of_the_fit(
    make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    prepared = prepare(recipe := make_recipe(make_source(), reconstruct="fast", cache_ratio=0.25))
    fit = Manifest.read(convert(recipe)).fit
    assert fit is not None
    assert prepared.fit is not None
    assert (fit.steps, fit.tokens, fit.rate) == (prepared.fit.steps, prepared.fit.tokens, prepared.fit.rate)


@pytest.mark.parametrize(
    ("settings", "because"),
    [
        ({"reconstruct": "off"}, "--reconstruct off"),
        ({"reconstruct": "auto", "calibration": {"sequences": 1}}, "one calibration sequence"),
        ({"reconstruct": "auto", "method": "transmla"}, "method transmla is a baseline"),
    ],
)
def test_a_note_says_which_shape_a_fitted_conversion_would_have(
    settings: dict[str, Any], because: str, make_source: Callable[..., Path], make_recipe: Callable[..., Recipe]
) -> None:
    source = make_source()
    unfitted = prepare(make_recipe(source, **settings)).plan
    fitted = prepare(make_recipe(source, reconstruct="fast")).plan
    assert unfitted.shape != fitted.shape
    (note,) = (note for note in unfitted.notes if "not fitted" in note)
    assert because in note
    assert f"latent {unfitted.shape.kv_lora_rank} + rotary {unfitted.shape.qk_rope_head_dim}" in note
    assert f"{fitted.shape.kv_lora_rank} + {fitted.shape.qk_rope_head_dim}" in note
    assert not any("not fitted" in note for note in fitted.notes)


def test_a_misspelt_format_is_refused_before_anything_is_downloaded(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transmla.convert.prepare.open_source", None)
    with pytest.raises(TransmlaError, match="unknown format 'nativ'"):
        prepare(make_recipe(Path("org/name"), format="nativ"))


@pytest.mark.parametrize(("length", "says"), [(32, "32 tokens at a time"), (None, "tokens at a time"), (256, None)])
def test_a_note_says_which_distances_the_text_shows(
    length: int | None,
    says: str | None,
    make_source: Callable[..., Path],
    make_recipe: Callable[..., Recipe],
) -> None:
    source = make_source(max_position_embeddings=4096 if length is None else 256)
    prepared = prepare(make_recipe(source, calibration={"sequences": 4, "length": length}))
    notes = [note for note in prepared.plan.notes if "at a time" in note]
    assert len(notes) == (says is not None)
    if says is not None:
        assert says in notes[0]
        assert f"{prepared.recipe.calibration.length:,} tokens" in notes[0]
        assert f"{prepared.source.spec.max_position_embeddings:,}" in notes[0]
