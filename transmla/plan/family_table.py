"""The table of supported model families, computed from the registry and a tiny model of each family."""

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

# Features that have their own column in docs/families.md.
TICKED = ("biases", "q/k norms", "windows")
# Versions of transformers with which the tests of all families pass.
TESTED = ("5.17", "5.23", "5.24")


@dataclass(frozen=True)
class Support:
    """Support for one model family.

    Attributes:
        family: the family's ``model_type``.
        models: names of models in the family.
        format: the export format that a conversion chooses.
        carried: features of the family's attention, all of which the export keeps.
        rope_types: rotary scalings that the family's configs allow, all of which the export keeps exactly.
    """

    family: str
    models: str
    format: str
    carried: tuple[str, ...]
    rope_types: tuple[str, ...]


def supported() -> list[Support]:
    """Return the support for every family in the registry."""
    families: dict[str, Family] = scan("transmla.families", "FAMILY")
    with _quiet():
        return [_support(family) for family in families.values()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings about the configs of tiny models."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def notes() -> str:
    """Return the note that follows the table: tested versions of transformers, and what is refused."""
    return (
        f"Tested with transformers {', '.join(TESTED)}. FP8 weights, and symmetric integers and FP8 of "
        "compressed-tensors, are dequantised tensor by tensor as they are read. Refused by name: every other family, "
        "rope_type dynamic, other quantised weights (GPTQ, AWQ, bitsandbytes, MXFP4), and models of more than text, "
        "whose language model converts by itself."
    )


def markdown() -> str:
    """Return the table of docs/families.md, in Markdown."""
    lines = [["family", "models", "format", *TICKED, "rope types", "also carried"]]
    lines.append(["---"] * len(lines[0]))
    for support in supported():
        ticks = ["yes" if name in support.carried else "–" for name in TICKED]
        rest = ", ".join(name for name in support.carried if name not in TICKED) or "–"
        types = "all" if support.rope_types == ROPE_TYPES else ", ".join(support.rope_types)
        lines.append([f"`{support.family}`", support.models, support.format, *ticks, types, rest])
    lines.append(["any other", "", "refused", *["" for _ in TICKED], "", ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tiny(family: Family, **changes: Any) -> Any:
    """Return the config of the family's tiny model, with ``changes``."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family.name, **{"pad_token_id": None, **family.tiny, **changes})


def _rope_types(family: Family, width: int) -> Iterator[str]:
    """Yield the rotary scalings of ``ROPE_TYPES`` that the family's configs allow, for heads of ``width`` channels."""
    from huggingface_hub.errors import StrictDataclassError

    known: dict[str, Any] = {"factor": 2.0, "original_max_position_embeddings": 128}
    for rope_type in ROPE_TYPES:
        # Some versions of transformers share default values between configs, so change a copy.
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
        except (StrictDataclassError, TransmlaError, KeyError):  # the family's config class or transmla refuses
            continue
        yield rope_type


def _support(family: Family) -> Support:
    """Describe one family, read from its tiny model without weights."""
    model: Any = empty_model(config := _tiny(family))
    spec = describe(config, model)
    attention, kinds = model.model.layers[0].self_attn, spec.kinds or (spec.kind(0),)
    rotary_pairs = {kind.rotary_pairs for kind in kinds}
    has = {
        "biases": spec.biased,
        "q/k norms": spec.normed,
        "windows": any(kind.window for kind in kinds),
        "experts": bool(spec.experts),
        "soft-capped scores": any(kind.softcap for kind in kinds),
        "sinks": hasattr(attention, "sinks"),
        "two rotary bases": len({kind.inv_freq[1] for kind in kinds if kind.rotary_pairs > 1}) > 1,
        "partial rotary": any(0 < count < spec.head_dim // 2 for count in rotary_pairs),
        "interleaved rotary": family.interleaved,
        "layers without rotary": 0 in rotary_pairs,
        "fused projections": hasattr(attention, "qkv_proj"),
    }
    carried = tuple(name for name, present in has.items() if present)
    form = best_format(spec).name
    return Support(family.name, family.models, form, carried, tuple(_rope_types(family, spec.head_dim)))
