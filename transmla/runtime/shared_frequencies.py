"""Rotary angles of a captured step, computed once for all layers with the same frequencies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from transmla.modeling.modeling_transmla import Frequencies

# Positions, and their cosines and sines, by frequencies and by the ``id`` of the positions. The positions are kept so
# that no other tensor gets this ``id``.
Angles = dict[tuple[Any, int], tuple[Tensor, tuple[Tensor, Tensor]]]


class SharedFrequencies:
    """The ``Frequencies`` of a model. Every layer has its own, and most layers have equal ones."""

    def __init__(self, modules: list[Any]) -> None:
        """Find the frequencies among ``modules``."""
        found = [module for module in modules if type(module) is Frequencies]
        self._kinds = [(module, (str(module.listed), module.short_length, module.factor)) for module in found]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Return a context for one step: equal frequencies share the angles of the same positions."""
        angles: Angles = {}
        for module, kind in self._kinds:
            module.forward = partial(_shared, angles, module, kind)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module, _ in self._kinds:
                del module.forward


def _shared(angles: Angles, module: Frequencies, kind: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``positions``, from ``angles`` if they are there."""
    key = kind, id(positions)
    if key not in angles:
        angles[key] = positions, type(module).forward(module, positions)
    return angles[key][1]
