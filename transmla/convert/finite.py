"""Refuse numbers that overflow, by layer, before a shard is written from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transmla.errors import TransmlaError
from transmla.ranks import Ranks
from transmla.source.checkpoint import is_finite

_REMEDY = "check that weights and config belong together, and that no weights of this layer are huge or all zero"


def check_tensors(place: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors are finite, in the dtype in which they are written.

    Args:
        place: the part of the model, such as "layer 3".
        tensors: the tensors by name.

    Raises:
        TransmlaError: if a value is NaN or infinite.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise _overflow(place, f"'{name}' is not finite", tensor.dtype)


def check_hidden(place: str, streams: Mapping[str, Tensor]) -> None:
    """Check that hidden states [N, T, D] are finite, and their mean squares, by which the next norm divides.

    Args:
        place: the part of the model.
        streams: the hidden states by name; other tensors [..., D] are allowed.

    Raises:
        TransmlaError: if the values or their squares overflow.
    """
    for name, stream in streams.items():
        if not bool(torch.stack([has_finite_squares(part) for part in stream]).all()):
            raise _overflow(place, f"the hidden states ({name}) overflow", stream.dtype)


def check_numbers(place: str, record: Mapping[str, Any]) -> None:
    """Check that the numbers of a manifest's record are finite.

    Raises:
        TransmlaError: if one is NaN or infinite.
    """
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise _overflow(place, f"'{name}' is not finite", torch.float32)


def has_finite_squares(x: Tensor) -> Tensor:
    """Return, as a boolean tensor [], whether mean(x²) over the last dimension is finite everywhere."""
    return x.float().square().mean(-1).isfinite().all()


@contextmanager
def watched_norms(place: str, module: nn.Module, ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Check the input of every norm inside ``module`` that runs during the context, in any of the processes ``ranks``.

    A norm whose input has infinite squares returns zeros: nothing after it would tell.

    Raises:
        TransmlaError: at the end, if the squares of an input overflow.
    """
    norms = {name: norm for name, norm in module.named_modules() if type(norm).__name__.endswith("Norm")}
    overflowing = {name: torch.zeros((), dtype=torch.int64, device=device) for name in norms}

    def watch(name: str, x: Tensor) -> None:
        overflowing[name] += ~has_finite_squares(x)

    hooks = [
        norm.register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0])) for name, norm in norms.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for name, count in overflowing.items():
        ranks.add_up(count)
        if bool(count):
            raise _overflow(place, f"the input of '{name}' overflows", torch.float32)


@contextmanager
def decompositions(place: str) -> Iterator[None]:
    """Convert the error of a matrix decomposition into a ``TransmlaError`` that names the place.

    Raises:
        TransmlaError: if a decomposition inside fails, as for matrices with infinite values.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise TransmlaError(
            f"{place}: its statistics cannot be decomposed",
            limit=str(error).splitlines()[0] if str(error) else "",
            remedy=f"use more calibration text; or {_REMEDY}",
        ) from error


def _overflow(place: str, what: str, dtype: torch.dtype) -> TransmlaError:
    name = str(dtype).removeprefix("torch.")
    limit = f"{name} holds numbers up to {torch.finfo(dtype).max:.1e}"
    return TransmlaError(f"{place}: {what}", limit=limit, remedy=_REMEDY)
