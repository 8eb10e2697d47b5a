"""Command-line options made from the recipe's fields, so that no option is declared twice."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.markup import escape
from typer.core import TyperCommand

from transmla.heal.settings import Healing
from transmla.recipe import Calibration, Recipe
from transmla.registry import scan

_PANELS = {
    "Shape": (
        "cache_ratio",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
        "q_lora_rank",
        "pad_for",
        "custom_rope",
        "allow_no_saving",
    ),
    "Format": ("format", "layers"),
    "Method": ("method", "reconstruct", "freqfold", "dtype", "seed", "device"),
    "Source": ("revision", "allow_pickle"),
}
_HEALING_PANELS = {
    "Text": ("self_tokens", "split", "column", "length", "held_out", "max_epochs"),
    "How long": ("max_tokens", "max_minutes", "patience"),
    "What is learned": ("trainable", "lora_rank", "kl", "cross_entropy", "hidden", "temperature"),
    "How": ("learning_rate", "other_rate", "warmup", "clip", "batch", "seed"),
    "Memory and speed": ("precision", "accumulate", "checkpointing", "compile"),
    "Keeping track": ("eval_every", "save_every"),
}


def _flag_type(annotation: Any) -> Any:
    """The plain type of a field: its choices become text that the recipe checks."""
    # `int | None` is a UnionType, `Annotated[int, …] | None` a Union.
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    arms = typing.get_args(annotation) if union else (annotation,)
    for arm in arms:
        while typing.get_origin(arm) is Annotated:
            arm = typing.get_args(arm)[0]
        if arm in (bool, int, float, str):
            return arm
    return str


def _option(flag: str, name: str, model: type[BaseModel], field: str, panel: str) -> inspect.Parameter:
    info = model.model_fields[field]
    kind = _flag_type(info.annotation)
    # By identity: a seed of 0 is a default worth showing.
    default = "" if info.default is None or info.default is False else f" (default: {info.default})"
    if kind is bool and info.default is None:
        flag = f"{flag}/--no-{flag[2:]}"
    choices = [c for c in _choices(info.annotation) if isinstance(c, str)]
    listed = f" ({', '.join(choices)})" if choices else ""
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            kind | None,
            typer.Option(
                flag,
                help=escape(f"{info.description}{listed}{default}"),
                rich_help_panel=panel,
                show_default=False,
            ),
        ],
    )


def _choices(annotation: Any) -> tuple[Any, ...]:
    found: tuple[Any, ...] = ()
    for arm in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(arm) is typing.Literal:
            found += typing.get_args(arm)
    return found


def recipe_parameters() -> list[inspect.Parameter]:
    """One keyword parameter per recipe field that a flag can set."""
    parameters = []
    for panel, fields in _PANELS.items():
        for field in fields:
            flag = "--" + field.replace("_", "-")
            parameters.append(_option(flag, field, Recipe, field, panel))
    for field in Calibration.model_fields:
        name = "calibration" if field == "source" else f"calibration_{field}"
        parameters.append(_option("--" + name.replace("_", "-"), name, Calibration, field, "Calibration text"))
    return parameters


class Command(TyperCommand):
    """A command whose help lists the methods there are; finding them takes torch, so only the help does it."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            if parameter.name == "method":
                parameter.help = _method_help()  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def _method_help() -> str:
    methods = scan("transmla.core.methods", "METHOD").values()
    lines = [
        f"conversion method (default: {Recipe.model_fields['method'].default})",
        *(f"{method.name}: {method.summary}" for method in methods),
    ]
    return escape("\n\n".join(lines))


def healing_parameters() -> list[inspect.Parameter]:
    """One keyword parameter per field of a healing that a flag can set once."""
    return [
        _option("--" + field.replace("_", "-"), field, Healing, field, panel)
        for panel, fields in _HEALING_PANELS.items()
        for field in fields
    ]


def with_recipe_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give ``function``, which takes ``**options``, every recipe option in its signature."""
    return _with_parameters(function, recipe_parameters())


def with_healing_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give ``function``, which takes ``**options``, every option of a healing in its signature."""
    return _with_parameters(function, healing_parameters())


def _with_parameters(function: Callable[..., None], more: list[inspect.Parameter]) -> Callable[..., None]:
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [*own, *more]

    def command(**kwargs: Any) -> None:
        function(**kwargs)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    )
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Flags that were given, nested as in a recipe file."""
    given = {name: value for name, value in options.items() if value is not None}
    calibration = {
        name.removeprefix("calibration").removeprefix("_") or "source": given.pop(name)
        for name in list(given)
        if name.startswith("calibration")
    }
    return given | ({"calibration": calibration} if calibration else {})
