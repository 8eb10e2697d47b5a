"""Choose how many neighbouring rotary frequencies are concentrated together (FreqFold, TransMLA, arXiv 2502.07864)."""

from __future__ import annotations

from transmla.core.methods.base import Method
from transmla.errors import TransmlaError
from transmla.recipe import Recipe


def choose_fold(recipe: Recipe, method: Method, slots: tuple[int, ...], pairs: int) -> int:
    """Choose how many neighbouring rotary frequencies are concentrated together.

    Args:
        recipe: the recipe, whose ``freqfold`` is used if given.
        method: the method, which prefers a fold.
        slots: index [d_r/2] of the source frequency of each rotary slot.
        pairs: number p of source frequencies.

    Raises:
        TransmlaError: if the fold does not fit the frequencies.
    """
    stride = max(1, pairs // len(set(slots)))
    repeated = len(set(slots)) < len(slots)
    preferred = 1 if repeated else method.freqfold(stride)
    fold = recipe.freqfold or (stride if pairs % preferred else preferred)
    check_fold(fold, stride, pairs)
    return fold


def check_fold(fold: int, stride: int, pairs: int) -> None:
    """Check that every fold contains a slot, and that folds divide the frequencies evenly.

    Args:
        fold: number of neighbouring frequencies in a fold.
        stride: distance between the frequencies of neighbouring slots.
        pairs: number p of source frequencies.

    Raises:
        TransmlaError: if the fold is not a multiple of ``stride``, or does not divide ``pairs``.
    """
    if fold % stride or pairs % fold:
        raise TransmlaError(
            f"freqfold {fold} does not fit the source's {pairs} rotary frequencies",
            limit=f"it must be a multiple of {stride} that divides {pairs}",
            remedy="choose another --freqfold, or leave it out",
        )
