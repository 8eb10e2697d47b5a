"""Command-line flags made from the fields of recipes, evaluations and healings, so that each is declared once."""

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

from transmla.errors import TransmlaError
from transmla.evaluate.settings import RetrievalSettings, TaskSettings
from transmla.heal.settings import Healing
from transmla.recipe import Calibration, Evaluation, Recipe
from transmla.registry import summaries

# A section's flags begin with its name. The flag of this field may also be the name alone: --calibration pydoc.
SECTIONS: dict[str, tuple[type[BaseModel], str]] = {
    "calibration": (Calibration, "source"),
    "eval": (Evaluation, "text"),
}
# Plug-ins that --help lists: flag → (folder, attribute).
SHELVES = {"method": ("transmla.core.methods", "METHOD"), "format": ("transmla.formats", "FORMAT")}

DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
PickleOption = Annotated[bool, typer.Option("--allow-pickle", help="Open pickled (.bin) weights, which can run code.")]
DtypeOption = Annotated[str, typer.Option(help="auto (as stored), float32 or bfloat16.")]


def with_recipe_options(*sections: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, which takes ``**options``, the flags of a recipe and of these of its ``sections``."""
    parameters = _parameters(Recipe)
    for name in sections:
        model, main = SECTIONS[name]
        parameters += _parameters(model, prefix=name, main=main)
    return _decorator(parameters)


def with_evaluation_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give ``function``, which takes ``**options``, the flags of an evaluation: on text, on tasks and of retrieval."""
    models = (Evaluation, TaskSettings, RetrievalSettings)
    return _decorator([parameter for model in models for parameter in _parameters(model)])(function)


def with_healing_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give ``function``, which takes ``**options``, the flags of a healing."""
    return _decorator(_parameters(Healing))(function)


def overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that were given, nested as in a recipe file."""
    given = given_options(options)
    for section, (_, main) in SECTIONS.items():
        names = [name for name in given if name == section or name.startswith(f"{section}_")]
        values = {name.removeprefix(section).removeprefix("_") or main: given.pop(name) for name in names}
        if values:
            given[section] = values
    return given


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that were given; a flag that may be repeated has an empty list otherwise."""
    return {name: value for name, value in options.items() if value is not None and value != []}


def command_line(options: dict[str, Any]) -> list[str]:
    """Return the flags that were given, as they are written on a command line."""
    words = []
    for name, value in given_options(options).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [f"--{flag}", str(one)]
    return words


def section_options(given: dict[str, Any], model: type[BaseModel], main: str, *, wanted: bool) -> dict[str, Any]:
    """Return the flags in ``given`` that are fields of ``model``.

    Raises:
        TransmlaError: if such a flag is given although the section, which the flag ``main`` asks for, is not wanted.
    """
    options = {name: value for name, value in given.items() if name in model.model_fields}
    if options and not wanted:
        flags = ["--" + name.replace("_", "-") for name in (next(iter(options)), main)]
        raise TransmlaError(f"{flags[0]} has no effect here", remedy=f"add {flags[1]}, or leave {flags[0]} out")
    return options


def help_of(model: type[BaseModel], field: str) -> str:
    """The help of a flag that a command declares itself, from the field's description."""
    return escape(_help(model.model_fields[field], default=False))


class Command(TyperCommand):
    """A command whose help lists methods and formats."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, methods and formats included."""
        self.list_plugins()
        super().format_help(ctx, formatter)

    def list_plugins(self) -> None:
        """Add to the help of a flag that names a plug-in the list of those there are."""
        for parameter in self.params:
            if parameter.name in SHELVES:
                listed = _plugin_help(*SHELVES[parameter.name])
                parameter.help = parameter.help.removesuffix(listed) + listed  # type: ignore[attr-defined]


def _plugin_help(package: str, attribute: str) -> str:
    """One paragraph for each plug-in of a folder."""
    return escape("".join(f"\n\n{name}: {summary}" for name, summary in summaries(package, attribute).items()))


def _parameters(model: type[BaseModel], *, prefix: str = "", main: str = "") -> list[inspect.Parameter]:
    """One keyword parameter for each field of ``model`` that has a panel."""
    parameters = []
    for field, info in model.model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict):
            name = "_".join(part for part in (prefix, "" if field == main else field) if part)
            also = (f"{prefix}_{field}",) if field == main else ()
            parameters.append(_parameter(name, model, field, str(extra["panel"]), also))
    return parameters


def _parameter(
    name: str, model: type[BaseModel], field: str, panel: str, also: tuple[str, ...] = ()
) -> inspect.Parameter:
    """The keyword parameter of one flag, with its other names ``also``; None if it is not given."""
    info, flag = model.model_fields[field], "--" + name.replace("_", "-")
    kind = _flag_type(info.annotation)
    if kind is bool and info.default is None:
        flag = f"{flag}/--no-{flag[2:]}"
    flags = [flag, *("--" + other.replace("_", "-") for other in also)]
    option = typer.Option(*flags, help=escape(_help(info)), rich_help_panel=panel, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _help(info: Any, *, default: bool = True) -> str:
    """Description, choices and, if asked for, default of a field."""
    choices = [choice for choice in _choices(info.annotation) if isinstance(choice, str)]
    listed = f" ({', '.join(choices)})" if choices else ""
    # By identity: a seed of 0 is a default worth showing.
    shown = default and info.default is not None and info.default is not False
    default_text = ", ".join(info.default) if isinstance(info.default, tuple) else info.default
    shown = shown and default_text != ""
    return (
        f"{info.description[0].upper()}{info.description[1:]}{listed}{f' (default: {default_text})' if shown else ''}"
    )


def _flag_type(annotation: Any) -> Any:
    """The plain type of a field; a list if the flag may be given several times. Choices are text."""
    if any(isinstance(choice, str) for choice in _choices(annotation)):
        return str
    # `int | None` is a UnionType, `Annotated[int, …] | None` a Union.
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    arms = typing.get_args(annotation) if union else (annotation,)
    for arm in arms:
        while typing.get_origin(arm) is Annotated:
            arm = typing.get_args(arm)[0]
        if typing.get_origin(arm) is tuple:
            return list[_flag_type(typing.get_args(arm)[0])]  # type: ignore[misc]
        if arm in (bool, int, float, str):
            return arm
    return str


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of all Literal types in ``annotation``."""
    choices: tuple[Any, ...] = ()
    for arm in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(arm) is typing.Literal:
            choices += typing.get_args(arm)
    return choices


def _decorator(parameters: list[inspect.Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that puts ``parameters`` in the place of a command's ``**options``."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        explicit = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*explicit, *parameters]]

        def command(**kwargs: Any) -> None:
            function(**kwargs)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in keywords}
        return command

    return decorate
