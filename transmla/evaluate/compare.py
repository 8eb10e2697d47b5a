"""Loading models by any name a source may have, and comparing them: on text, and in speed."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from transmla.errors import TransmlaError
from transmla.evaluate.bench import Bench, bench
from transmla.evaluate.perplexity import check_stride, evaluate
from transmla.export.card import write_card
from transmla.export.manifest import Manifest
from transmla.formats.base import format_named
from transmla.modeling.transformers_api import register
from transmla.recipe import Evaluation, Recipe
from transmla.reporter import Reporter
from transmla.runtime.load import accelerate
from transmla.source.device import pick_device
from transmla.source.load import load_model, load_tokenizer
from transmla.source.locate import resolve_source
from transmla.source.text import load_tokens


def evaluate_models(
    model: str,
    baseline: str | None,
    settings: Evaluation,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Perplexity of ``model`` and, given a ``baseline``, its distance from it, as plain values.

    ``pydoc`` is read from its test split unless told otherwise. ``revision`` belongs to the baseline.
    """
    check_stride(settings.window, settings.stride)
    place = pick_device(device)
    path = resolve_source(model)
    split = settings.split or ("test" if settings.text == "pydoc" else None)
    with _refusing(path):
        tokenizer = load_tokenizer(path)
    stride = settings.stride or settings.window
    limit = None if settings.max_windows is None else settings.window + (settings.max_windows - 1) * stride
    tokens = load_tokens(settings.text, tokenizer, limit=limit, split=split, column=settings.column)
    other = None if baseline is None else _load(resolve_source(baseline, revision=revision), dtype, place)
    loaded = _load(path, dtype, place)
    windows = max(1, (len(tokens) - settings.window) // stride + 1)
    reporter.stage("eval_mode", min(windows, settings.max_windows or windows))
    result = evaluate(
        loaded,
        tokens,
        window=settings.window,
        max_windows=settings.max_windows,
        stride=settings.stride,
        baseline=other,
        progress=lambda done, _: reporter.advance(done),
    )
    return {"model": model, "baseline": baseline, "text": settings.text, "split": split, **result.to_dict()}


def evaluate_export(folder: Path, recipe: Recipe, reporter: Reporter) -> dict[str, Any]:
    """Compare a fresh export with its source on the recipe's ``eval`` text, and write it into the card."""
    assert recipe.eval is not None
    result = evaluate_models(
        str(folder),
        recipe.source,
        recipe.eval,
        device=recipe.device,
        revision=recipe.revision,
        reporter=reporter,
    )
    manifest = Manifest.read(folder)
    write_card(folder, manifest, recipe, format_named(manifest.format).card_words(manifest.plan.spec), result)
    return result


def bench_models(
    model: str,
    baseline: str | None,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    backend: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    reporter: Reporter,
) -> dict[str, Bench]:
    """Speed of ``model``, accelerated, and of a ``baseline`` as transformers runs it; one in memory at a time."""
    place = pick_device(device)
    found = {}
    for role, name in (("baseline", baseline), ("model", model)):
        if name is None:
            continue
        loaded = _load(resolve_source(name), dtype, place)
        if role == "model":
            accelerate(loaded, backend=backend)
        found[role] = bench(loaded, batches=batches, contexts=contexts, steps=steps, reporter=reporter)
        # Compiled steps hold on to the model, and it to its memory.
        del loaded
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _load(path: Path, dtype: str, device: torch.device) -> Any:
    if dtype not in ("auto", "float32", "bfloat16"):
        raise TransmlaError(f"dtype '{dtype}' is not supported", limit="auto, float32 or bfloat16", remedy="choose one")
    register()
    with _refusing(path):
        return load_model(path, dtype=dtype).to(device)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """One line for whatever the loaders underneath raise, which is whatever the files make them raise."""
    try:
        yield
    except TransmlaError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise TransmlaError(
            f"cannot load '{path}' as a causal LM",
            limit=f"{type(error).__name__}: {reason}" if reason else type(error).__name__,
            remedy="check the files, and that the device holds the model",
        ) from error
