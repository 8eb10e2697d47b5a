"""Masks are read once, and again if they were changed."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from transmla.runtime.known_masks import KnownMasks


def longer(mask: Tensor) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), 1)], -1)


@pytest.mark.parametrize("hidden", [0, 2])
@pytest.mark.parametrize("inference", [False, True])
def test_extended_masks_share_their_prompt(hidden: int, inference: bool) -> None:
    with torch.inference_mode(inference):
        known, mask = KnownMasks(), torch.ones(2, 5, dtype=torch.int64)
        mask[0, :hidden] = 0
        prompt = known.read(mask)
        assert prompt.hides == (hidden > 0)
        for _ in range(3):
            before, mask = mask, longer(mask)
            known.extend(before, mask)
            assert known.read(mask) is prompt


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_was_changed_is_read_again(inference: bool) -> None:
    with torch.inference_mode(inference):
        known, mask = KnownMasks(), torch.ones(2, 5, dtype=torch.int64)
        first = known.read(mask)
        mask[0, 0] = 0
        second = known.read(mask)
        assert (first.hides, second.hides) == (False, True)


def test_unknown_masks_say_nothing_of_their_continuation() -> None:
    known, mask = KnownMasks(), torch.zeros(2, 5)
    extended = longer(mask)
    known.extend(mask, extended)
    assert known.read(extended).hides
    known.extend(extended, None)
    known.extend(None, mask)


def test_masks_are_not_kept() -> None:
    known = KnownMasks()
    for _ in range(3):
        known.read(torch.ones(2, 5))
    gc.collect()
    assert not known._known
