"""Shares of several texts in one mixture, from entries ``NAME`` or ``NAME:WEIGHT``; and shares written as percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

# Largest difference from 1 at which weights count as summing to 1: three thirds may be written 0.33, 0.33 and 0.34.
TOLERANCE = 0.005


def of_percent(value: Any) -> str:
    """Return the words that turn a percentage, such as 50 or "50%", into a share; "" if ``value`` is none."""
    text = str(value).strip()
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        return ""
    # A bare number just above 1 is no percentage.
    is_percentage = percent > 0 if text.endswith("%") else percent >= 2
    return f"; {percent:g} percent is {percent / 100:g}" if is_percentage and percent <= 100 else ""


def name_and_weight(entry: str) -> tuple[str, float | None]:
    """Split an entry into its name and its weight; None if it has no weight.

    Only a number after the last colon is a weight, so a Hub dataset with a configuration (``org/name:config``) is a
    name.

    Raises:
        ValueError: if the weight is not above 0, or is above 1.
    """
    name, colon, text = entry.rpartition(":")
    try:
        weight = float(text.removesuffix("%"))
    except ValueError:
        return entry, None
    if not (colon and name):
        return entry, None
    if not 0 < weight <= 1 or text.endswith("%"):
        allowed = f"must be above 0 and at most 1{of_percent(text)}"
        raise ValueError(f"the weight of '{name}' is {text}, and {allowed}")
    return name, weight


def shares(entries: Sequence[str]) -> dict[str, float]:
    """Return the share of every text by name; the shares sum to 1.

    Entries without a weight divide equally what the weights leave.

    Raises:
        ValueError: if a text is named twice, weights do not sum to 1, or nothing is left for an entry without a weight.
    """
    pairs = [name_and_weight(entry) for entry in entries]
    names = [name for name, _ in pairs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"'{repeated[0]}' is given twice")
    given = sum(weight for _, weight in pairs if weight is not None)
    free = sum(weight is None for _, weight in pairs)
    if not free and abs(given - 1) > TOLERANCE:
        raise ValueError(f"the weights sum to {given:g}, and must sum to 1 unless a text has no weight")
    if free and given >= 1:
        raise ValueError(f"the weights sum to {given:g}, and leave nothing for the texts without a weight")
    scale = 1.0 if free else given
    return {name: (1 - given) / free if weight is None else weight / scale for name, weight in pairs}


def percentages(shares_of_texts: Mapping[str, float]) -> dict[str, str]:
    """Write shares that sum to 1 as whole percentages that sum to 100, by name; large remainders are rounded up."""
    whole = {name: int(100 * share + TOLERANCE) for name, share in shares_of_texts.items()}
    by_remainder = sorted(whole, key=lambda name: whole[name] - 100 * shares_of_texts[name])
    for name in by_remainder[: 100 - sum(whole.values())]:
        whole[name] += 1
    return {name: f"{share}%" for name, share in whole.items()}


def _as_tuple(value: Any) -> Any:
    """Return one entry, a list or a mapping NAME → WEIGHT as a tuple. YAML reads ``- pydoc: 0.5`` as a mapping."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, dict):
        return tuple(f"{name}" if weight is None else f"{name}:{weight}" for name, weight in value.items())
    if isinstance(value, list):
        return tuple(entry for item in value for entry in (_as_tuple(item) if isinstance(item, dict) else (item,)))
    return value


def _checked(entries: tuple[str, ...]) -> tuple[str, ...]:
    if not entries:
        raise ValueError("name at least one text")
    shares(entries)
    return entries


def _named(entries: tuple[str, ...]) -> tuple[str, ...]:
    if not entries:
        raise ValueError("name at least one text")
    if len(set(entries)) < len(entries):
        raise ValueError("a text is given twice")
    return entries


# Texts that are mixed, with optional weights. One text may be written without a list.
Mixture = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), AfterValidator(_checked)]
# Texts that are used one after the other, without weights.
Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), AfterValidator(_named)]
