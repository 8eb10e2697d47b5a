"""Recipes: all settings of one conversion, typed, from a YAML file or from flags.

Every field is declared once, here: its type, its default, its description and its panel in ``--help``. The command line
makes its flags from these fields (``cli/options.py``).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from transmla.boundary import boundary, read_text
from transmla.errors import TransmlaError
from transmla.recipe_values import CACHE_AUTO, DEFAULT_MAX_KL, CacheRatio, Heal, Reconstruct, no_truth
from transmla.shares import Mixture, Texts, of_percent


class Strict(BaseModel):
    """Settings that refuse unknown keys and numbers that are not finite, and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for a number, which pydantic reads as 1 and 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        return no_truth(value) if _is_number(annotation) else value


def _is_number(annotation: Any) -> bool:
    """Return whether a field of this type takes numbers only. Types that also take words check their values."""
    arms = get_args(annotation) or (annotation,)
    return {get_args(arm)[0] if get_origin(arm) is Annotated else arm for arm in arms} <= {int, float, type(None)}


# Panels of --help. A field without a panel is an argument or a section.
SOURCE: dict[str, Any] = {"panel": "Source"}
SHAPE: dict[str, Any] = {"panel": "Shape"}
FORMAT: dict[str, Any] = {"panel": "Format"}
METHOD: dict[str, Any] = {"panel": "Method"}
TEXT: dict[str, Any] = {"panel": "Calibration text"}
EVALUATION: dict[str, Any] = {"panel": "Evaluation"}

# End of a GGUF file's name that says how the weights are stored, such as .Q4_K_M or -bf16.
QUANTISATION = re.compile(r"[.-](?:(?:i|t)?q\d\w*|bf16|fp?16|f32|mxfp4\w*)$", re.IGNORECASE)

# End of the name of one of several GGUF files of a model.
PART = re.compile(r"-\d{5}-of-\d{5}$")


class Calibration(Strict):
    """The text on which a conversion measures and fits the model."""

    source: Mixture = Field(
        ("auto",),
        json_schema_extra=TEXT,
        description="text to calibrate on; give it several times for a mixture, as NAME or NAME:WEIGHT. auto: prose, "
        "code, documentation, chats and samples of the model; self: samples of the model; pydoc, stdlib, packages: "
        "documentation and code on this machine; a .txt/.md/.jsonl/.json/.csv/.parquet file; or a Hub dataset "
        "(wikitext, c4, org/name). Rows of messages go through the chat template",
    )
    split: str | None = Field(
        None, json_schema_extra=TEXT, description="split of datasets, or of pydoc, stdlib and packages (train or test)"
    )
    column: str | None = Field(None, json_schema_extra=TEXT, description="column of texts or chats of a dataset")
    sequences: PositiveInt | None = Field(
        None,
        json_schema_extra=TEXT,
        description="number of calibration sequences (default: 64, and more of shorter ones)",
    )
    length: int | None = Field(
        None,
        ge=2,
        json_schema_extra=TEXT,
        description="tokens per calibration sequence (default: 8192 on a GPU with the memory, 512 on a CPU)",
    )


class Evaluation(Strict):
    """The texts on which an export is compared with its source."""

    text: Texts = Field(
        ("pydoc",),
        json_schema_extra=EVALUATION,
        description="text to evaluate on: pydoc, stdlib, packages, a file (.txt, .jsonl, .csv, .parquet, …), or a Hub "
        "dataset (wikitext, c4, org/name); give the flag several times for several texts",
    )
    split: str | None = Field(
        None,
        json_schema_extra=EVALUATION,
        description="split of pydoc, stdlib and packages (train or test) and of Hub datasets (default: test of these "
        "and of wikitext, validation of c4, train of others)",
    )
    column: str | None = Field(
        None, json_schema_extra=EVALUATION, description="text column of tables and Hub datasets (default: text)"
    )
    window: int = Field(2048, ge=2, json_schema_extra=EVALUATION, description="tokens per window")
    max_windows: PositiveInt | None = Field(
        None, json_schema_extra=EVALUATION, description="number of windows per text at most (default: the whole text)"
    )
    stride: PositiveInt | None = Field(
        None,
        json_schema_extra=EVALUATION,
        description="tokens between the starts of two windows (default: windows do not overlap)",
    )


class Recipe(Strict):
    """One conversion from a source to an export."""

    source: str = Field(description="checkpoint folder, .gguf file, package:NAME/FILE, or Hub id")
    output: str = Field(
        "", description="folder to write (default: the name of the source and -mla, in the current directory)"
    )
    revision: str | None = Field(None, json_schema_extra=SOURCE, description="branch, tag or commit of a Hub id")
    allow_pickle: bool = Field(
        False, json_schema_extra=SOURCE, description="open pickled (.bin) weights, which can run code"
    )
    cache_ratio: CacheRatio = Field(
        None,
        json_schema_extra=SHAPE,
        description="cache of the export as a share of the source's; chooses latent and rotary width (default: 0.5). "
        "auto: the smallest cache that --max-kl allows, measured on text that is not calibrated on",
    )
    max_kl: float | None = Field(
        None,
        gt=0,
        json_schema_extra=SHAPE,
        description="with --cache-ratio auto: the largest KL to the source that is accepted, in nats per token, before "
        "healing (default: 0.1, about that of half the cache). Formats that can store it get a width for each layer",
    )
    kv_lora_rank: PositiveInt | None = Field(
        None, json_schema_extra=SHAPE, description="width of the latent, instead of a cache ratio"
    )
    qk_rope_head_dim: PositiveInt | None = Field(
        None, json_schema_extra=SHAPE, description="width of the rotary key, instead of a cache ratio"
    )
    qk_nope_head_dim: PositiveInt | None = Field(
        None, json_schema_extra=SHAPE, description="width of the position-free query, at least the source's head width"
    )
    v_head_dim: PositiveInt | None = Field(
        None, json_schema_extra=SHAPE, description="width of a value head, at least the source's"
    )
    q_lora_rank: PositiveInt | None = Field(None, json_schema_extra=SHAPE, description="compress queries to this rank")
    pad_for: Literal["vllm"] | None = Field(
        None, json_schema_extra=SHAPE, description="round the shape to one that has fast kernels there"
    )
    custom_rope: bool = Field(
        False,
        json_schema_extra=SHAPE,
        description="store a rotary table that repeats frequencies; only transformers reads it",
    )
    allow_no_saving: bool = Field(
        False, json_schema_extra=SHAPE, description="accept a cache that is no smaller than the source's"
    )
    format: str = Field(
        "auto",
        json_schema_extra=FORMAT,
        description="export format; auto takes the native format where it can store the source",
    )
    layers: str | None = Field(
        None,
        json_schema_extra=FORMAT,
        description="layers to convert, such as 4-28 or 0-3,8; the others keep their attention (format transmla)",
    )
    method: str = Field("calibrated", json_schema_extra=METHOD, description="conversion method")
    reconstruct: Reconstruct = Field(
        "auto",
        json_schema_extra=METHOD,
        description="fit every layer to the source after its closed form; auto is full on a GPU, fast on a CPU, and "
        "off for baseline methods. A fitted conversion has a narrower rotary key and a wider latent",
    )
    heal: Heal = Field(
        "auto",
        json_schema_extra=METHOD,
        description="distil the export from its source at the end: auto (on a GPU that has the memory), off, or a "
        "number of minutes",
    )
    freqfold: PositiveInt | None = Field(
        None, json_schema_extra=METHOD, description="neighbouring rotary frequencies that are concentrated together"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", json_schema_extra=METHOD, description="precision of the export"
    )
    seed: int = Field(0, ge=0, lt=2**31, json_schema_extra=METHOD, description="seed of everything that is drawn")
    device: str = Field("auto", json_schema_extra=METHOD, description="device: auto, cpu, cuda, cuda:1, …")
    calibration: Calibration = Calibration()
    eval: Evaluation | None = None

    @model_validator(mode="after")
    def _named_output(self) -> Self:
        """Give ``output`` its default, which depends on the source."""
        if "output" not in self.model_fields_set:
            object.__setattr__(self, "output", default_output(self.source))
        return self

    @model_validator(mode="after")
    def _budget(self) -> Self:
        """Check that ``max_kl`` and other settings of the cache fit together.

        Raises:
            TransmlaError: if two settings decide about the size of the cache, or the cache would not shrink.
        """
        if self.max_kl is not None and self.cache_ratio != CACHE_AUTO:
            given = "no cache ratio" if self.cache_ratio is None else f"a cache ratio of {self.cache_ratio:g}"
            raise TransmlaError(
                f"--max-kl {self.max_kl:g} was given with {given}",
                limit="a largest KL chooses the size of the cache, so nothing else may",
                remedy="pass --cache-ratio auto, or leave --max-kl out",
            )
        if isinstance(self.cache_ratio, float) and self.cache_ratio > 1 and not self.allow_no_saving:
            percent = of_percent(self.cache_ratio)
            larger = "lower --cache-ratio, or pass --allow-no-saving for a cache that is no smaller"
            raise TransmlaError(
                f"a cache ratio of {self.cache_ratio:g} was given",
                limit=f"it is a share of the source's cache, above 0 and at most 1{percent}",
                remedy=f"give --cache-ratio {self.cache_ratio / 100:g}" if percent else larger,
            )
        fixed = [name for name in ("kv_lora_rank", "qk_rope_head_dim", "pad_for") if getattr(self, name) is not None]
        if self.cache_ratio == CACHE_AUTO and fixed:
            flag = "--" + fixed[0].replace("_", "-")
            raise TransmlaError(
                f"{flag} was given with --cache-ratio auto",
                limit="--cache-ratio auto chooses the widths of latent and rotary key",
                remedy="leave one of the two out",
            )
        return self

    @property
    def accepted_kl(self) -> float | None:
        """The largest KL to the source, in nats per token, that chooses the cache; None if the recipe gives a size."""
        if self.cache_ratio != CACHE_AUTO:
            return None
        return DEFAULT_MAX_KL if self.max_kl is None else self.max_kl


def default_output(source: str) -> str:
    """Return the folder that a conversion of ``source`` writes if none is named, such as ``Qwen3-8B-mla``."""
    name = Path(os.path.abspath(os.path.expanduser(source))).name
    if name.endswith(".gguf"):
        name = re.sub(QUANTISATION, "", re.sub(PART, "", name.removesuffix(".gguf")))
    return f"{name}-mla"


Section = TypeVar("Section", bound=BaseModel)


def parse_section(schema: type[Section], values: dict[str, Any], origin: str = "command line") -> Section:
    """Check ``values`` against ``schema``, and report every mistake at once.

    ``origin`` names where the values come from, for the error.

    Raises:
        TransmlaError: that names each unknown key and each value out of range.
    """
    try:
        return schema(**values)
    except ValidationError as error:
        mistakes = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            unknown = item["type"] == "extra_forbidden"
            # A setting that ends at 1 is a share.
            bounds = item.get("ctx", {})
            hint = of_percent(item["input"]) if 1 in (bounds.get("le"), bounds.get("lt")) else ""
            mistakes.append(f"{key}: unknown key" if unknown else f"{key}: {item['msg'].lower()}{hint}")
        known = ", ".join(_keys(schema))
        unknown = any(mistake.endswith("unknown key") for mistake in mistakes)
        remedy = f"known keys: {known}" if unknown else "correct it; --help lists what can be given"
        raise TransmlaError(f"{origin}: " + "; ".join(mistakes), remedy=remedy) from error


def _keys(schema: type[BaseModel]) -> list[str]:
    """Every key of ``schema``; keys of a section as ``section.key``."""
    sections: dict[str, type[BaseModel]] = {"calibration": Calibration, "eval": Evaluation}
    keys = []
    for name in schema.model_fields:
        section = sections.get(name)
        keys += [f"{name}.{key}" for key in section.model_fields] if section else [name]
    return keys


def parse_recipe(values: dict[str, Any], origin: str) -> Recipe:
    """Return the recipe that plain ``values`` describe; raises as ``parse_section`` does."""
    return parse_section(Recipe, values, origin)


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a mapping that gives a key twice, of which YAML would ignore the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node."""
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise TransmlaError(
                    f"line {key.start_mark.line + 1} of the recipe gives '{key.value}' again",
                    limit="of two values of a key, YAML ignores the first",
                    remedy="keep one of the two",
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path, overrides: dict[str, Any]) -> Recipe:
    """Return the recipe in the YAML file ``path``; ``overrides``, nested like the file, take precedence.

    Raises:
        TransmlaError: if the file cannot be read, or holds unknown keys or bad values.
    """
    with boundary(f"cannot read recipe '{path}'", remedy="check the file"):
        values = yaml.load(read_text(path, "recipe"), Loader=_EachKeyOnce)
    if not isinstance(values, dict):
        raise TransmlaError(f"recipe '{path}' is not a mapping of keys to values", remedy="see recipes/")
    if wrong := [key for key in values if not isinstance(key, str)]:
        raise TransmlaError(
            f"recipe '{path}': {wrong[0]!r} is not a key", limit="keys are words", remedy="see recipes/"
        )
    return parse_recipe(merge(values, overrides), str(path))


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``overrides`` laid over it, section by section."""
    merged = dict(base)
    for key, value in overrides.items():
        section = merged.get(key)
        if isinstance(value, dict) and section is not None:
            # A section that is not a mapping is a mistake of the file. It is kept, so that it is reported.
            merged[key] = merge(section, value) if isinstance(section, dict) else section
        else:
            merged[key] = value
    return merged


def dump_recipe(recipe: Recipe) -> str:
    """Return ``recipe`` as YAML, without fields that are None."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False)
