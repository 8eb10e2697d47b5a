"""Compare what an export computes and contains with its signature, and with its source."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from transmla.export.signature import LayerSignature, Signature
from transmla.formats.model_checks import Check
from transmla.signature.layers import LayerProjections
from transmla.signature.probe import Projections
from transmla.signature.sign import CONTENTS, Measured

# Largest deviation of a projection, as a fraction of its size. Devices without float64 sum in float32, which differs
# from float64 by up to 2.8e-6 on SmolLM2-135M and 3.2e-5 on Qwen2.5-Coder-0.5B. Any head's rows of any projection times
# 1.02 give 1.7e-3 or more on SmolLM2-135M.
TOLERANCE = 1e-4
# Largest deviation of the whole model's logits in bfloat16: in units of the change by rounding that the signature
# records, and at least. A right export of Qwen2.5-Coder-0.5B deviates by up to 3 times the recorded change in vLLM, and
# one with twice the rotary frequencies by 14 times.
ROUNDINGS, LEAST_TOLERANCE = 5.0, 0.05
# Relative difference of two floats in a config that counts as equal: tables of frequencies are computed in float32.
CLOSE = 1e-6
# Differences that a check lists.
LISTED = 3


def compare_contents(signature: Signature, found: dict[str, Any], healings: int) -> Check:
    """Compare an export's files, and the precision of its tensors, with its signature.

    Args:
        signature: the export's signature.
        found: ``contents`` of the export.
        healings: number of healings in the manifest.
    """
    wrong = [f"{name}: {line}" for name in CONTENTS for line in differences(getattr(signature, name), found[name])]
    if healings != signature.healings:
        wrong.append(f"the manifest lists {healings} healings, and {signature.healings} are signed")
    return Check("contents as signed", not wrong, _listed(wrong) or "config, tokenizer, code and precision are equal")


def compare_layers(signature: Signature, measured: Measured, *, experts: bool) -> Check:
    """Compare what each layer, the embedding and the head compute with the export's signature."""
    deviations = list(_layer_deviations(measured.layers, signature.layers, experts=experts))
    deviations.append(("the embedding", _largest(measured.rest.embedding, signature.embedding)))
    deviations.append(("the head", _largest(measured.rest.head, signature.head)))
    return _check("layers as signed", deviations)


def rounded_tolerances(rounding: list[float]) -> list[float]:
    """Return the largest deviation of each group's logits in bfloat16, for a signature's ``rounding``."""
    return [max(LEAST_TOLERANCE, ROUNDINGS * change) for change in rounding]


def compare_logits(signature: Signature, logits: Projections, tolerance: float) -> Check:
    """Compare the whole model's logits for seeded tokens with the signature.

    Args:
        signature: the export's signature.
        logits: projections of the loaded model's logits.
        tolerance: largest deviation as a fraction of the logits' size.
    """
    worst = _largest(logits, signature.logits)
    return Check(
        "logits as signed", worst <= tolerance, f"they deviate by {worst:.1e}, at most {tolerance:.0e} allowed"
    )


def compare_with_source(
    signature: Signature, export: list[LayerProjections], source: list[LayerProjections], *, experts: bool
) -> Iterator[Check]:
    """Compare the source's layers with those that were signed, and the export's errors with the signed errors.

    Args:
        signature: the export's signature, with its source.
        export: projections of the export's layers.
        source: projections of the source's layers, on the same inputs.
        experts: whether the layers route tokens to experts.
    """
    yield _check("source layers as signed", list(_layer_deviations(source, signature.source, experts=experts)))
    changes = []
    for now, origin, then, before in zip(export, source, signature.layers, signature.source, strict=False):
        error, recorded = (
            _minus(now.attention.values, origin.attention.values),
            _minus(then.attention, before.attention),
        )
        changes.append(_norm(_minus(error, recorded)) / max(_norm(now.attention.sizes), 1e-30))
    complete = len(export) == len(source) == len(signature.layers) == len(signature.source)
    worst = max(changes, default=math.inf)
    limit = 2 * TOLERANCE
    detail = f"a layer's distance has changed by {worst:.1e} since, at most {limit:.0e} allowed"
    passed = complete and all(change <= limit for change in changes)
    yield Check("distance to the source as signed", passed, detail if complete else "another number of layers")


def differences(recorded: Any, found: Any, name: str = "", *, close: float = 0.0) -> list[str]:
    """Return the differences of two JSON values, each as one line that begins with its place.

    Args:
        recorded: the expected value.
        found: the value to compare.
        name: place of both values.
        close: relative difference of two floats that counts as equal.
    """
    if isinstance(recorded, dict) and isinstance(found, dict):
        keys = sorted({*recorded, *found})
        missing = object()
        return [
            line
            for key in keys
            for line in _entry(
                recorded.get(key, missing), found.get(key, missing), f"{name}.{key}".lstrip("."), missing, close
            )
        ]
    if isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        pairs = enumerate(zip(recorded, found, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{name}.{i}".lstrip("."), close=close)]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (recorded, found))
    if numbers and math.isclose(recorded, found, rel_tol=close):
        return []
    if type(recorded) is type(found) and recorded == found:
        return []
    return [f"{name} is {_short(found)}, not {_short(recorded)}".lstrip()]


def _entry(recorded: Any, found: Any, name: str, missing: object, close: float) -> list[str]:
    if recorded is missing:
        return [f"{name} was added"]
    return [f"{name} is missing"] if found is missing else differences(recorded, found, name, close=close)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _listed(lines: list[str]) -> str:
    more = f"; {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    return "; ".join(lines[:LISTED]) + more


def _layer_deviations(
    measured: list[LayerProjections], recorded: list[LayerSignature], *, experts: bool
) -> Iterator[tuple[str, float]]:
    """Yield the deviation of each layer's attention and change, with its name.

    A router may send a token to another expert if two are nearly equal. Its group of tokens then does not count.
    """
    if len(measured) != len(recorded):
        yield f"{len(measured)} layers, {len(recorded)} signed", math.inf
    for i, (now, then) in enumerate(zip(measured, recorded, strict=False)):
        yield f"the attention of layer {i}", _largest(now.attention, then.attention)
        yield f"layer {i}", _largest(now.change, then.change, spared=int(experts))


def _largest(now: Projections, recorded: list[float], *, spared: int = 0) -> float:
    """Return the largest deviation but ``spared``; infinity if one is NaN."""
    deviations = sorted(math.inf if math.isnan(value) else value for value in now.deviations(recorded))
    return deviations[-1 - spared] if len(deviations) > spared else math.inf


def _check(name: str, deviations: list[tuple[str, float]]) -> Check:
    wrong = [place for place, deviation in deviations if not deviation <= TOLERANCE]
    worst = max((deviation for _, deviation in deviations), default=math.inf)
    detail = f"largest deviation {worst:.1e}, at most {TOLERANCE:.0e} allowed"
    return Check(name, bool(deviations) and not wrong, f"{_listed(wrong)}: {detail}" if wrong else detail)


def _minus(left: Iterable[float], right: Iterable[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=False)]


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(sum(value * value for value in values))
