"""Attention masks whose hidden tokens are known, so that no decode step reads a mask from the GPU."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


class Prompt:
    """What a mask and all masks that extend it by ones have in common.

    Attributes:
        hides: whether the masks hide a token.
    """

    def __init__(self, *, hides: bool) -> None:
        self.hides = hides


class KnownMasks:
    """Masks [B, T] that were read, and those by which ``generate()`` continued them.

    ``generate()`` makes a new mask for every token by appending ones to the last one. Reading a mask makes the host
    wait for the GPU; the first one of a ``generate()`` says what the others hide.
    """

    def __init__(self) -> None:
        # By the mask's ``id``: the mask, its prompt, and its version when it was read.
        self._known: dict[int, tuple[weakref.ref[Tensor], Prompt, int]] = {}

    def read(self, mask: Tensor) -> Prompt:
        """Return the prompt of ``mask``; the mask is read if it is unknown or was changed in place."""
        known = self._known.get(id(mask))
        if known is not None and known[2] == _version(mask):
            return known[1]
        prompt = Prompt(hides=not bool(mask.all()))
        # Inference tensors do not count their changes. One that a caller passes twice is read twice.
        self._remember(mask, prompt, -1 if mask.is_inference() else _version(mask))
        return prompt

    def extend(self, mask: Any, longer: Any) -> None:
        """Note that ``longer`` is ``mask`` with ones appended."""
        known = self._known.get(id(mask))
        if known is not None and isinstance(longer, Tensor) and known[2] in (-1, _version(mask)):
            self._remember(longer, known[1], _version(longer))

    def _remember(self, mask: Tensor, prompt: Prompt, version: int) -> None:
        key = id(mask)
        forget = weakref.ref(mask, lambda _, known=self._known: known.pop(key, None))  # type: ignore[misc]
        self._known[key] = forget, prompt, version


def _version(mask: Tensor) -> int:
    """How often ``mask`` was changed in place; 0 if it does not count."""
    return 0 if mask.is_inference() else mask._version
