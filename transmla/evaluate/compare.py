"""Evaluate or bench a model given by name, and compare it with a baseline."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from transmla.errors import TransmlaError
from transmla.evaluate.bench import Bench, bench
from transmla.evaluate.perplexity_and_kl import check_stride, evaluate
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
    """Measure the perplexity of a model on a text and, given a baseline, its KL divergence from the baseline.

    Args:
        model: local folder or Hub name.
        baseline: local folder or Hub name, or None.
        settings: text and windows. The default split of ``pydoc`` is ``test``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: device of both models, or ``auto``.
        revision: revision of the baseline on the Hub.
        reporter: receives the progress.

    Returns:
        The names of model, baseline, text and split, and the fields of ``perplexity.Evaluation``; plain values.

    Raises:
        TransmlaError: if a model or the text cannot be loaded, or ``evaluate`` refuses them.
    """
    check_stride(settings.window, settings.stride)
    torch_device = pick_device(device)
    path = resolve_source(model)
    split = settings.split or ("test" if settings.text == "pydoc" else None)
    with load_errors(path):
        tokenizer = load_tokenizer(path)
    stride = settings.stride or settings.window
    limit = None if settings.max_windows is None else settings.window + (settings.max_windows - 1) * stride
    tokens = load_tokens(settings.text, tokenizer, limit=limit, split=split, column=settings.column)
    other = None if baseline is None else load_named(resolve_source(baseline, revision=revision), dtype, torch_device)
    loaded = load_named(path, dtype, torch_device)
    windows = max(1, (len(tokens) - settings.window) // stride + 1)
    reporter.stage("evaluating", min(windows, settings.max_windows or windows))
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
    """Evaluate a new export on the recipe's ``eval`` text against its source, and write the result into the card.

    Args:
        folder: the export.
        recipe: its recipe, with a section ``eval``.
        reporter: receives the progress.

    Returns:
        The result of ``evaluate_models``.

    Raises:
        TransmlaError: as ``evaluate_models``.
    """
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
    """Measure the decoding speed of an accelerated model and of a baseline as transformers runs it.

    Only one of them is in memory at a time.

    Args:
        model: export with MLA: local folder or Hub name.
        baseline: local folder or Hub name, or None.
        batches: batch sizes.
        contexts: context lengths, in tokens.
        steps: timed decoding steps per point.
        backend: MLA backend of the model, or ``auto``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: device name, or ``auto``.
        reporter: receives the progress.

    Returns:
        The measurements under the keys ``model`` and, if given, ``baseline``.

    Raises:
        TransmlaError: if a model cannot be loaded, has no MLA layer, or does not fit (see ``bench``).
    """
    torch_device = pick_device(device)
    results = {}
    for role, name in (("baseline", baseline), ("model", model)):
        if name is None:
            continue
        loaded = load_named(resolve_source(name), dtype, torch_device)
        if role == "model":
            accelerate(loaded, backend=backend)
        results[role] = bench(loaded, batches=batches, contexts=contexts, steps=steps, reporter=reporter)
        # Compiled steps keep references to the model; without a reset, its memory would not be freed.
        del loaded
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return results


def load_named(path: Path, dtype: str, device: torch.device) -> Any:
    """Load a model in evaluation mode, with the attention that transformers gives it.

    Args:
        path: checkpoint folder or GGUF file.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: device of the model.

    Raises:
        TransmlaError: if ``dtype`` is unknown or the model cannot be loaded.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise TransmlaError(f"dtype '{dtype}' is not supported", limit="auto, float32 or bfloat16", remedy="choose one")
    register()
    with load_errors(path):
        return load_model(path, dtype=dtype).to(device)


@contextmanager
def load_errors(path: Path) -> Iterator[None]:
    """Convert any exception into a one-line ``TransmlaError``: damaged files make loaders raise any type."""
    try:
        yield
    except TransmlaError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise TransmlaError(
            f"cannot load '{path}' as a causal LM",
            limit=f"{type(error).__name__}: {reason}" if reason else type(error).__name__,
            remedy="check the files, and that the model fits into the device's memory",
        ) from error
