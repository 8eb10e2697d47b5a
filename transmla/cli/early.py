"""Refusals of a wrong command line before torch and transformers are imported, which takes seconds.

The functions that do the work check the same again, for callers from Python.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transmla.errors import TransmlaError
from transmla.export.hashes import finished_hashes
from transmla.export.output import output_path, refuse_taken
from transmla.export.travel import is_resaved
from transmla.recipe import Recipe
from transmla.registry import check_name
from transmla.shares import shares
from transmla.source.locate import check_source, refuse_revision
from transmla.source.text import check_text

AUTO = "auto"
DTYPES = (AUTO, "float32", "bfloat16")


def load_libraries() -> None:
    """Import transformers, and silence its progress bars and advice."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def refuse_recipe(recipe: Recipe) -> None:
    """Check the names of method and format, and that the source is there.

    Raises:
        TransmlaError: if one of them does not exist, or if a local source has a revision.
    """
    check_name("transmla.core.methods", "METHOD", recipe.method, kind="method")
    if recipe.format != AUTO:
        check_name("transmla.formats", "FORMAT", recipe.format, kind="format")
    check_source(recipe.source)
    refuse_revision(recipe.source, recipe.revision)


def refuse_processes(number: int) -> None:
    """Check a number of processes.

    Raises:
        TransmlaError: if it is below 1.
    """
    if number < 1:
        raise TransmlaError(
            f"--processes {number} is no number of processes",
            limit="at least 1",
            remedy="give the number of GPUs that will share the work",
        )


def refuse_run(output: str, texts: Iterable[str], *, resume: bool) -> None:
    """Check the output of a conversion or healing, and that the files of its texts are there.

    A resumed run may have finished its output, and may have read its texts.

    Args:
        output: the folder to write.
        texts: the mixture of texts, as ``NAME`` or ``NAME:WEIGHT``.
        resume: whether the run is resumed.

    Raises:
        TransmlaError: if the output is taken or cannot be written, or a file is missing.
    """
    folder = output_path(output)
    if not resume:
        refuse_taken(folder)
        for name in shares(tuple(texts)):
            check_text(name)


def refuse_models(*names: str | None) -> None:
    """Check that each of the models that is given is there; raises as ``check_source`` does."""
    for name in names:
        if name is not None:
            check_source(name)


def refuse_backend(name: str) -> None:
    """Check the name of a decode backend.

    Raises:
        TransmlaError: if there is no backend of this name.
    """
    if name != AUTO:
        check_name("transmla.kernels", "BACKEND", name, kind="backend")


def refuse_dtype(name: str, known: tuple[str, ...] = DTYPES) -> None:
    """Check the name of a precision.

    Raises:
        TransmlaError: if it is not ``known``.
    """
    if name not in known:
        listed = f"{', '.join(known[:-1])} or {known[-1]}"
        raise TransmlaError(f"dtype '{name}' is not supported", limit=listed, remedy="choose one")


def refuse_unfinished(folder: Path) -> None:
    """Check that a folder holds a finished export, which other software may have saved again.

    Raises:
        TransmlaError: as ``finished_hashes``.
    """
    if not is_resaved(folder):
        finished_hashes(folder)
