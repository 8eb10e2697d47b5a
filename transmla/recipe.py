"""Recipes: everything a conversion can be told, typed, in a YAML file or as flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

from transmla.errors import TransmlaError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# YAML reads a bare `off` as false.
Reconstruct = Annotated[
    Literal["auto", "off", "fast", "full"], BeforeValidator(lambda value: "off" if value is False else value)
]


class Calibration(Strict):
    """Text that the conversion measures the model on."""

    source: str = Field(
        "self",
        description="self, pydoc, a .txt/.jsonl/.parquet file, or a Hub dataset (wikitext, c4, org/name)",
    )
    split: str | None = Field(None, description="split of a dataset, or of pydoc (train, test)")
    column: str | None = Field(None, description="text column of a dataset")
    sequences: PositiveInt = Field(64, description="number of sequences")
    length: int = Field(512, ge=2, description="tokens per sequence")


class Evaluation(Strict):
    """Text on which source and export are compared after the conversion."""

    text: str = Field("pydoc", description="the same kinds of text as calibration")
    split: str | None = Field(None, description="split of a dataset, or of pydoc (train, test)")
    column: str | None = Field(None, description="text column of a dataset")
    window: int = Field(2048, ge=2, description="tokens per window")
    max_windows: PositiveInt | None = Field(None, description="number of windows at most")
    stride: PositiveInt | None = Field(None, description="tokens between windows; default: window")


class Recipe(Strict):
    """One conversion from source to export."""

    source: str = Field(description="checkpoint folder, .gguf file, package:NAME/FILE, or Hub id")
    output: str = Field(description="folder to write")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub id")
    method: str = Field("calibrated", description="conversion method")
    cache_ratio: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="cache of the export as a share of the source's; chooses the shape",
    )
    kv_lora_rank: PositiveInt | None = Field(None, description="width of the latent")
    qk_rope_head_dim: PositiveInt | None = Field(None, description="width of the rotary key")
    qk_nope_head_dim: PositiveInt | None = Field(None, description="position-free query width (padding)")
    v_head_dim: PositiveInt | None = Field(None, description="value head width (padding)")
    q_lora_rank: PositiveInt | None = Field(None, description="compress queries to this rank")
    pad_for: Literal["vllm"] | None = Field(None, description="round to a shape with fast kernels")
    freqfold: PositiveInt | None = Field(None, description="frequencies concentrated together")
    reconstruct: Reconstruct = Field(
        "auto",
        description="fit every layer to the source's after the closed form; auto: full on a GPU, fast on a CPU, "
        "off for methods that are there to compare with. --cache-ratio chooses a narrower rotary key for a fit",
    )
    format: str = Field("auto", description="export format")
    layers: str | None = Field(
        None, description="layers to convert, such as 4-28 or 0-3,8; the others keep their attention (format transmla)"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="precision of the export")
    allow_no_saving: bool = Field(False, description="accept a cache no smaller than the source's")
    allow_pickle: bool = Field(False, description="open pickled (.bin) weights")
    custom_rope: bool = Field(
        False, description="one rotary table for the whole model that repeats frequencies (transformers only)"
    )
    calibration: Calibration = Calibration()
    eval: Evaluation | None = None
    seed: int = Field(0, ge=0, lt=2**31, description="seed of all sampling")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, …")


Section = TypeVar("Section", bound=BaseModel)


def parse_section(schema: type[Section], values: dict[str, Any], origin: str = "command line") -> Section:
    """Check ``values`` against ``schema`` and report every mistake at once.

    Raises:
        TransmlaError: naming each unknown key and each value out of range.
    """
    try:
        return schema(**values)
    except ValidationError as error:
        mistakes = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            unknown = item["type"] == "extra_forbidden"
            mistakes.append(f"{key}: unknown key" if unknown else f"{key}: {item['msg'].lower()}")
        known = ", ".join(_keys(schema))
        unknown = any(mistake.endswith("unknown key") for mistake in mistakes)
        remedy = f"known keys: {known}" if unknown else "correct it; --help lists what can be given"
        raise TransmlaError(f"{origin}: " + "; ".join(mistakes), remedy=remedy) from error


def _keys(schema: type[BaseModel]) -> list[str]:
    """Every key of ``schema``, those of its sections as section.key."""
    sections: dict[str, type[BaseModel]] = {"calibration": Calibration, "eval": Evaluation}
    keys = []
    for name in schema.model_fields:
        section = sections.get(name)
        keys += [f"{name}.{key}" for key in section.model_fields] if section else [name]
    return keys


def parse_recipe(values: dict[str, Any], origin: str) -> Recipe:
    """A recipe from plain values; see ``parse_section``."""
    return parse_section(Recipe, values, origin)


def read_recipe(path: Path, overrides: dict[str, Any]) -> Recipe:
    """A recipe from a YAML file; ``overrides`` (nested like the file) win over it."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TransmlaError(
            f"cannot read recipe '{path}'", limit=str(error).replace("\n", " "), remedy="check the file"
        ) from error
    if not isinstance(values, dict):
        raise TransmlaError(f"recipe '{path}' is not a mapping of keys to values", remedy="see recipes/")
    return parse_recipe(merge(values, overrides), str(path))


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``overrides`` laid over it, section by section."""
    merged = dict(base)
    for key, value in overrides.items():
        section = merged.get(key)
        if isinstance(value, dict) and section is not None:
            # A section that is no section is a mistake of the file: kept, so that it is reported.
            merged[key] = merge(section, value) if isinstance(section, dict) else section
        else:
            merged[key] = value
    return merged


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False)
