"""Checks before a step that follows a replayed one. What they leave out is checked while the GPU works."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from transformers import DynamicCache

from transmla.runtime.latent_cache import LatentLayer
from transmla.runtime.step_cache import Step

KEYS, APPENDED = operator.attrgetter("_keys"), operator.attrgetter("_appended")


class NextStep:
    """What a replayed step knows of its cache. Every other use of the cache replaces or moves something of this.

    Attributes:
        step: the step, which may be replayed again.
    """

    def __init__(self, step: Step, layers: list[LatentLayer], new: int) -> None:
        """Take note of the ``layers`` of a cache behind ``step``, which took ``new`` tokens of each sequence."""
        self.step, self._layers, self._keys = step, [*layers], [*map(KEYS, layers)]
        self._appended, self._inference = layers[0]._appended, torch.is_inference_mode_enabled()
        self._shape, self._device = (len(step.inputs.tokens), new), step.inputs.tokens.device

    def fits(self, cache: DynamicCache, tokens: Tensor | None) -> bool:
        """Return whether a step for ``tokens`` on ``cache`` may be replayed as the last one was.

        The host does nothing else between two replays of a step, so that all loops run in C.
        """
        layers = cache.layers
        return (
            tokens is not None
            and tokens.shape == self._shape
            and tokens.device == self._device
            and len(layers) == len(self._layers)
            and all(map(operator.is_, layers, self._layers))
            and all(map(operator.is_, map(KEYS, layers), self._keys))
            and {*map(APPENDED, layers)} == {self._appended}
            and self._layers[0].own_length() + self.step.inputs.tokens.shape[1] <= self.step.capacity
            and torch.is_inference_mode_enabled() == self._inference
        )
