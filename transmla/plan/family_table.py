"""Which families convert, and to what: read off the registry and each family's own tiny model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transmla.errors import TransmlaError
from transmla.families.base import ROPE_TYPES, Family, rope_tables
from transmla.plan.make_plan import best_format
from transmla.registry import scan
from transmla.source.describe import describe, empty_model

# What has a column of its own in the README.
TICKED = ("biases", "q/k norms", "windows")
# Versions of transformers that all families' tests have passed on.
TESTED = ("5.17", "5.23", "5.24")


@dataclass(frozen=True)
class Support:
    """One family: its ``model_type``, models of it, the format that it becomes, and what its attention has.

    ``rope_types`` are the rotary scalings that its configs may ask for and that are carried exactly.
    """

    family: str
    models: str
    format: str
    carried: tuple[str, ...]
    rope_types: tuple[str, ...]


def supported() -> list[Support]:
    """All families of the registry."""
    families: dict[str, Family] = scan("transmla.families", "FAMILY")
    with _quiet():
        return [_support(family) for family in families.values()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of configs that are no model's."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def notes() -> str:
    """What holds for all families."""
    return (
        f"Tested with transformers {', '.join(TESTED)}. Refused by name: every other family, rope_type dynamic, "
        "quantised weights, and models of more than text, whose language model converts by itself."
    )


def markdown() -> str:
    """The table of the README."""
    lines = [["family", "models", "format", *TICKED, "rope types", "also carried"]]
    lines.append(["---"] * len(lines[0]))
    for found in supported():
        ticks = ["yes" if name in found.carried else "–" for name in TICKED]
        rest = ", ".join(name for name in found.carried if name not in TICKED) or "–"
        types = "all" if found.rope_types == ROPE_TYPES else ", ".join(found.rope_types)
        lines.append([f"`{found.family}`", found.models, found.format, *ticks, types, rest])
    lines.append(["any other", "", "refused", *["" for _ in TICKED], "", ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tiny(family: Family, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family.name, **{"pad_token_id": None, **family.tiny, **changes})


def _rope_types(family: Family, width: int) -> Iterator[str]:
    """The rotary scalings of ``ROPE_TYPES`` that the family's configs take, for heads ``width`` wide."""
    from huggingface_hub.errors import StrictDataclassError

    known: dict[str, Any] = {"factor": 2.0, "original_max_position_embeddings": 128}
    for rope_type in ROPE_TYPES:
        # A copy: configs of some versions share their defaults.
        config = copy.deepcopy(_tiny(family))
        for table in rope_tables(config):
            pairs = round(width * table.get("partial_rotary_factor", 1.0)) // 2
            more: dict[str, dict[str, Any]] = {
                "default": {},
                "linear": {"factor": 2.0},
                "llama3": known | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "longrope": known | {"short_factor": [1.0] * pairs, "long_factor": [1.0] * pairs},
            }
            table.update({"rope_type": rope_type} | more.get(rope_type, known))
        try:
            describe(_tiny(family, rope_parameters=config.rope_parameters))
        except (StrictDataclassError, TransmlaError, KeyError):  # as a config of this family refuses, and as we do
            continue
        yield rope_type


def _support(family: Family) -> Support:
    model: Any = empty_model(config := _tiny(family))
    spec = describe(config, model)
    attention, kinds = model.model.layers[0].self_attn, spec.kinds or (spec.kind(0),)
    turned = {kind.turned for kind in kinds}
    has = {
        "biases": spec.biased,
        "q/k norms": spec.normed,
        "windows": any(kind.window for kind in kinds),
        "experts": spec.experts,
        "soft-capped scores": any(kind.softcap for kind in kinds),
        "sinks": hasattr(attention, "sinks"),
        "two rotary bases": len({kind.inv_freq[1] for kind in kinds if kind.turned > 1}) > 1,
        "partial rotary": any(0 < count < spec.head_dim // 2 for count in turned),
        "interleaved rotary": family.interleaved,
        "layers without rotary": 0 in turned,
        "fused projections": hasattr(attention, "qkv_proj"),
    }
    carried = tuple(name for name, there in has.items() if there)
    form = best_format(spec).name
    return Support(family.name, family.models, form, carried, tuple(_rope_types(family, spec.head_dim)))
