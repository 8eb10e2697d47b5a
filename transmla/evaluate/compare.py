"""Evaluate or bench a model given by name, and compare it with a baseline."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from transmla.boundary import boundary
from transmla.errors import TransmlaError
from transmla.evaluate.bench import Bench, bench
from transmla.evaluate.perplexity_and_kl import check_config, check_vocabularies, evaluate, text_config
from transmla.evaluate.scores import mean_over_texts
from transmla.evaluate.texts import Text, check_texts, read_texts
from transmla.export.card import public_evaluation, write_card
from transmla.export.hashes import EVALUATION
from transmla.export.manifest import Manifest, versions
from transmla.files import json_text, write_text
from transmla.formats.base import format_named
from transmla.modeling.registration import register
from transmla.recipe import Evaluation, Recipe
from transmla.reporter import Reporter
from transmla.runtime.load import accelerate, require_backend
from transmla.source.device import pick_device
from transmla.source.load import check_runs, check_tokenizer, load_config, load_model, load_tokenizer
from transmla.source.locate import resolve_source


def evaluate_models(
    model: str,
    baseline: str | None,
    settings: Evaluation,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    allow_pickle: bool = False,
    reporter: Reporter,
) -> dict[str, Any]:
    """Measure the perplexity of a model on texts and, given a baseline, its KL divergence from the baseline.

    All texts are read and checked before a model is loaded, and the models are loaded once.

    Args:
        model: local folder or Hub name.
        baseline: local folder or Hub name, or None.
        settings: texts and windows.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: device of both models, or ``auto``.
        revision: revision of the baseline on the Hub.
        allow_pickle: whether pickled weights may be opened.
        reporter: receives the progress, in windows of all texts.

    Returns:
        Plain values. ``texts`` has one entry per text: its name (``text``), its ``split``, and the fields of
        ``perplexity_and_kl.Evaluation``. ``mean`` is their mean (``scores.mean_over_texts``). The other keys are
        ``model``, ``baseline``, ``window`` (tokens), ``starts_with_bos``, ``device``, ``dtype``, ``seconds`` and
        ``versions``.

    Raises:
        TransmlaError: if a model or a text cannot be loaded, or ``evaluate`` refuses them.
    """
    _check_dtype(dtype)
    check_texts(settings)
    torch_device = pick_device(device)
    path = resolve_source(model, allow_pickle=allow_pickle)
    texts = _read_texts(path, settings)
    vocabulary = _check_model(path, texts, "model")
    pickles = {"allow_pickle": allow_pickle}
    other = None if baseline is None else resolve_source(baseline, revision=revision, **pickles)
    if other is not None:
        check_vocabularies(vocabulary, _check_model(other, texts, "baseline"))
        _check_tokens(path, other, texts)
    reference = None if other is None else load_named(other, dtype, torch_device, **pickles)
    loaded = load_named(path, dtype, torch_device, **pickles)
    reporter.stage("evaluating", sum(text.windows.count for text in texts))
    results: list[dict[str, Any]] = []
    for text in texts:
        before = sum(result["windows"] for result in results)
        result = evaluate(
            loaded,
            text.windows.text,
            window=settings.window,
            max_windows=settings.max_windows,
            stride=settings.stride,
            bos=text.windows.bos,
            baseline=reference,
            progress=partial(_advance, reporter, before, text.name),
        )
        results.append({"text": text.name, "split": text.split, **result.to_dict()})
    return {
        "model": model,
        "baseline": baseline,
        "window": settings.window,
        "starts_with_bos": results[0]["starts_with_bos"],
        "texts": results,
        "mean": mean_over_texts(results),
        "device": torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else str(torch_device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "seconds": sum(result["seconds"] for result in results),
        "versions": versions(),
    }


def _advance(reporter: Reporter, before: int, text: str, done: int, _: int) -> None:
    reporter.advance(before + done, text)


def check_evaluation(recipe: Recipe) -> None:
    """Check the recipe's ``eval`` texts before a conversion: read them, and compare them with the source's config.

    Raises:
        TransmlaError: if a text cannot be read, or the source does not support it.
    """
    if recipe.eval is not None:
        check_texts(recipe.eval)
        # The conversion needs an unpacked GGUF file anyway, and reads its tokenizer in a second.
        weights = recipe.source.endswith(".gguf")
        path = resolve_source(recipe.source, revision=recipe.revision, weights=weights)
        _check_model(path, _read_texts(path, recipe.eval), "source")


def _read_texts(path: Path, settings: Evaluation) -> list[Text]:
    """Read the texts with the tokenizer of the model in ``path``."""
    with load_errors(path):
        load_config(path)  # a damaged config is not the tokenizer's fault
        tokenizer = load_tokenizer(path)
    return read_texts(settings, tokenizer)


def _check_model(path: Path, texts: list[Text], name: str) -> int | None:
    """Check by its config that a model supports the texts, and return the size of its vocabulary."""
    with load_errors(path):
        config = load_config(path)
    for text in texts:
        check_config(config, text.windows, name)
    return getattr(text_config(config), "vocab_size", None)


def _check_tokens(model: Path, baseline: Path, texts: list[Text]) -> None:
    """Check that the tokens of the texts mean the same to a model and its baseline.

    A baseline without a tokenizer is not checked. Tokens that no text holds may differ, such as those of a chat.

    Raises:
        TransmlaError: if a token differs, or a tokenizer cannot be loaded.
    """
    try:
        check_tokenizer(baseline)
    except TransmlaError:
        return
    ours, theirs = load_tokenizer(model), load_tokenizer(baseline)
    for text in texts:
        tokens = text.windows.text.unique().tolist()
        named = (ours.convert_ids_to_tokens(tokens), theirs.convert_ids_to_tokens(tokens))
        for token, here, there in zip(tokens, *named, strict=True):
            if here != there:
                raise TransmlaError(
                    f"the baseline reads '{text.name}' by another tokenizer",
                    limit=f"token {token} is {here!r} to the model, and {there!r} to the baseline",
                    remedy="compare a model with the one it was converted from",
                )


def evaluate_export(folder: Path, recipe: Recipe, reporter: Reporter) -> dict[str, Any]:
    """Evaluate a new export on the recipe's ``eval`` texts against its source.

    The result is written into the card as a table, and into ``evaluation.json`` with all its numbers. Local paths are
    cut to their last part in both, because they are published.

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
        allow_pickle=recipe.allow_pickle,
        reporter=reporter,
    )
    published = public_evaluation(result)
    write_text(folder / EVALUATION, json_text(published) + "\n")
    manifest = Manifest.read(folder)
    write_card(folder, manifest, recipe, format_named(manifest.format).card_words(manifest.plan.spec), published)
    return result


def bench_models(
    model: str,
    baseline: str | None,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    new_tokens: Sequence[int] = (1,),
    steps: int,
    backend: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    allow_pickle: bool = False,
    reporter: Reporter,
) -> dict[str, Bench]:
    """Measure the decoding speed of an accelerated model and of a baseline as transformers runs it.

    Only one of them is in memory at a time.

    Args:
        model: export with MLA: local folder or Hub name.
        baseline: local folder or Hub name, or None.
        batches: batch sizes.
        contexts: context lengths, in tokens.
        new_tokens: numbers of tokens that a step decodes, per sequence.
        steps: timed decoding steps per point.
        backend: MLA backend of the model, or ``auto``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: device name, or ``auto``.
        allow_pickle: whether pickled weights may be opened.
        reporter: receives the progress.

    Returns:
        The measurements under the keys ``model`` and, if given, ``baseline``.

    Raises:
        TransmlaError: if a model cannot be loaded, has no MLA layer, or does not fit (see ``bench``), or if ``backend``
            does not serve the model.
    """
    _check_dtype(dtype)
    torch_device = pick_device(device)
    results = {}
    # The model comes first: a backend that cannot serve it is refused before the baseline is measured.
    for role, name in (("model", model), ("baseline", baseline)):
        if name is None:
            continue
        path = resolve_source(name, allow_pickle=allow_pickle)
        loaded = load_named(path, dtype, torch_device, allow_pickle=allow_pickle)
        if role == "model":
            require_backend(loaded, backend)
            accelerate(loaded, backend=backend)
        results[role] = bench(
            loaded, batches=batches, contexts=contexts, new_tokens=new_tokens, steps=steps, reporter=reporter
        )
        # Compiled steps keep references to the model; without a reset, its memory would not be freed.
        del loaded
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return {role: results[role] for role in ("baseline", "model") if role in results}


def _check_dtype(dtype: str) -> None:
    if dtype not in ("auto", "float32", "bfloat16"):
        raise TransmlaError(f"dtype '{dtype}' is not supported", limit="auto, float32 or bfloat16", remedy="choose one")


def load_named(path: Path, dtype: str, device: torch.device, *, allow_pickle: bool = False) -> Any:
    """Load a model in evaluation mode, with the attention that transformers gives it.

    Args:
        path: checkpoint folder or GGUF file.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: device of the model.
        allow_pickle: whether pickled weights may be opened.

    Raises:
        TransmlaError: if ``dtype`` is unknown, or the model cannot be loaded or run.
    """
    _check_dtype(dtype)
    register()
    with load_errors(path):
        model = load_model(path, dtype=dtype, allow_pickle=allow_pickle).to(device)
    check_runs(model, path)
    return model


def load_errors(path: Path) -> AbstractContextManager[None]:
    """Return the boundary around loaders of a model's files."""
    return boundary(
        f"cannot load '{path}' as a causal LM",
        remedy="check the files, and that the model fits into the device's memory",
    )
