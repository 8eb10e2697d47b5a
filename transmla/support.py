"""Which families convert, and to what: read off the registry and each family's own tiny model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transmla.families.base import ROPE_TYPES, Family
from transmla.registry import scan
from transmla.spec import describe, empty_model

# What has a column of its own in the README.
TICKED = ("biases", "q/k norms", "windows")


@dataclass(frozen=True)
class Support:
    """One family: its ``model_type``, models of it, the format that it becomes, and what its attention has."""

    family: str
    models: str
    format: str
    carried: tuple[str, ...]


def supported() -> list[Support]:
    """All families of the registry."""
    families: dict[str, Family] = scan("transmla.families", "FAMILY")
    return [_support(family) for family in families.values()]


def notes() -> str:
    """What holds for all families."""
    return (
        f"Rotary scalings carried exactly: {', '.join(ROPE_TYPES)}. Refused by name: dynamic and longrope, quantised "
        "weights, and models of more than text, whose language model converts by itself."
    )


def markdown() -> str:
    """The table of the README."""
    lines = [["family", "models", "format", *TICKED, "also carried"]]
    lines.append(["---"] * len(lines[0]))
    for found in supported():
        ticks = ["yes" if name in found.carried else "–" for name in TICKED]
        rest = ", ".join(name for name in found.carried if name not in TICKED) or "–"
        lines.append([f"`{found.family}`", found.models, found.format, *ticks, rest])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _support(family: Family) -> Support:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family.name, **{"pad_token_id": None, **family.tiny})
    model: Any = empty_model(config)
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
    return Support(family.name, family.told, "own" if spec.native_gap else "native", carried)
