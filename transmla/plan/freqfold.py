"""How many neighbouring rotary frequencies are concentrated together (FreqFold, TransMLA, arXiv 2502.07864)."""

from __future__ import annotations

from transmla.core.methods.base import Method
from transmla.errors import TransmlaError
from transmla.recipe import Recipe


def choose_fold(recipe: Recipe, method: Method, slots: tuple[int, ...], pairs: int) -> int:
    """How many neighbouring frequencies are concentrated together."""
    stride = max(1, pairs // len(set(slots)))
    repeated = len(set(slots)) < len(slots)
    preferred = 1 if repeated else method.freqfold(stride)
    fold = recipe.freqfold or (stride if pairs % preferred else preferred)
    check_fold(fold, stride, pairs)
    return fold


def check_fold(fold: int, stride: int, pairs: int) -> None:
    """Every fold must hold a slot, and folds must tile the frequencies."""
    if fold % stride or pairs % fold:
        raise TransmlaError(
            f"freqfold {fold} does not fit the source's {pairs} rotary frequencies",
            limit=f"it must be a multiple of {stride} that divides {pairs}",
            remedy="choose another --freqfold, or leave it out",
        )
