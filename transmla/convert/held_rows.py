"""Keep rows of the calibration mixture apart: some to choose the cache on, others to check what was promised."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from transmla.convert.prepare import Prepared
from transmla.errors import TransmlaError
from transmla.recipe import Recipe

# Tokens of each of the two held-out sets, and rows of a set at least and at most.
HELD_TOKENS, FEWEST, MOST = 8192, 4, 16


@dataclass(frozen=True)
class Rows:
    """The calibration mixture in three parts without a common row.

    Attributes:
        choosing: token ids [n, T] on which the cache is chosen; empty if the recipe gives a size.
        checking: token ids [n, T] that decide nothing; empty if the recipe gives a size.
        calibration: token ids [N, T] that layers are converted on.
    """

    choosing: Tensor
    checking: Tensor
    calibration: Tensor


def held_rows(length: int) -> int:
    """Return the rows of each held-out set, for rows of ``length`` tokens."""
    return min(MOST, max(FEWEST, HELD_TOKENS // length))


def with_held_rows(recipe: Recipe) -> Recipe:
    """Return the recipe, with amounts resolved, that reads the held-out rows as well."""
    if recipe.accepted_kl is None:
        return recipe
    calibration = recipe.calibration
    rows = (calibration.sequences or 0) + 2 * held_rows(calibration.length or 1)
    return recipe.model_copy(update={"calibration": calibration.model_copy(update={"sequences": rows})})


def check_rows(prepared: Prepared, count: int) -> None:
    """Check that ``count`` sequences, which the caller of a conversion gives, suffice for the held-out sets.

    Raises:
        TransmlaError: if there are too few.
    """
    needed = 3 if prepared.fit is None else 4
    if prepared.recipe.accepted_kl is not None and count < needed:
        raise TransmlaError(
            f"--cache-ratio auto was given {count} calibration sequences",
            limit=f"at least {needed}: one chooses the cache, one checks the choice, and the others are converted on",
            remedy="give more sequences, or a cache ratio",
        )


def split_rows(prepared: Prepared, tokens: Tensor) -> Rows:
    """Divide token ids [N, T]. Held-out rows come first: a fit judges itself on the last rows, one of each text.

    Of tokens that the caller of a conversion gives, at most a quarter is in each held-out set.
    """
    recipe, held = prepared.recipe, 0
    if recipe.accepted_kl is not None:
        held = held_rows(tokens.shape[1])
        if len(tokens) != with_held_rows(recipe).calibration.sequences:
            held = min(held, max(1, len(tokens) // 4))
    return Rows(tokens[:held], tokens[held : 2 * held], tokens[2 * held :])
