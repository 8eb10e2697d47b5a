"""Values of a recipe that are a word or a number: the cache ratio, the fit and the healing."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from transmla.shares import of_percent

HEAL_AUTO, HEAL_OFF = "auto", "off"
# The value of ``cache_ratio`` that lets a conversion choose the smallest cache whose KL to the source is accepted, and
# the KL that is accepted if the recipe does not say: about what half the cache costs (docs/choosing.md).
CACHE_AUTO, DEFAULT_MAX_KL = "auto", 0.1


def no_truth(value: Any) -> Any:
    """Return a value that is neither true nor false, as YAML reads yes, on, no and off."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "it must be a number, not yes, no, true or false")
    return value


def _off(value: Any) -> Any:
    """Return what YAML means by a bare `off`, which it reads as false."""
    return "off" if value is False else value


def _healing(value: Any) -> Any:
    """Check a request for healing: auto, off, or minutes."""
    value = _off(value)
    if value in (HEAL_AUTO, HEAL_OFF):
        return value
    try:
        minutes = float(value)
    except (TypeError, ValueError):
        minutes = 0.0
    if not 0 < minutes < math.inf or isinstance(value, bool):
        raise PydanticCustomError("heal", "it must be auto, off, or minutes above 0")
    return minutes


def _ratio(value: Any) -> Any:
    """Check a cache ratio: auto, or a number, which the command line gives as text."""
    if no_truth(value) == CACHE_AUTO:
        return value
    try:
        return _RATIO.validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        number = not problem["type"].endswith(("_parsing", "less_than_equal"))
        said = problem["msg"] if number else f"it must be auto, or a share above 0 and at most 1{of_percent(value)}"
        raise PydanticCustomError("cache_ratio", said) from error


_RATIO: TypeAdapter[float | None] = TypeAdapter(Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None)
CacheRatio = Annotated[Literal["auto"] | float | None, BeforeValidator(_ratio)]
Reconstruct = Annotated[Literal["auto", "off", "fast", "full"], BeforeValidator(_off)]
Heal = Annotated[Literal["auto", "off"] | float, BeforeValidator(_healing)]
