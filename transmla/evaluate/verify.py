"""Verify an export: load it through transformers, then check its consistency, its plan, its signature and its source.

Native exports are loaded by classes of transformers, exports of the transmla format by classes of this package. Code
inside an export never runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import Plan, value_bytes
from transmla.boundary import reason
from transmla.evaluate.record import forget, record
from transmla.evaluate.verify_source import SourceChecks
from transmla.export.hashes import UNHASHED, check_hashes
from transmla.export.manifest import Manifest
from transmla.export.signature import Signature
from transmla.formats.base import Format, format_named
from transmla.formats.model_checks import Check, beyond_rounding, compare_decoding
from transmla.guard.config import check_config
from transmla.modeling.registration import register
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.signature.compare import compare_contents, compare_layers, compare_logits, rounded_tolerances
from transmla.signature.probe import project_logits, tokens
from transmla.signature.sign import Measured, contents, measure_export
from transmla.source.locate import resolve_source

# Tokens per row of the test prompt.
PROMPT_TOKENS = 96
# Largest deviation of the whole model's logits from the signed ones in float32.
LOGITS_TOLERANCE = 1e-3
# The same for models with experts in bfloat16: after rounding, a router may choose another expert.
ROUTED_TOLERANCE = 5e-1


def verify(
    folder: Path,
    *,
    source: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    allow_pickle: bool = False,
) -> Iterator[Check]:
    """Yield the checks of an export one by one, and write ``verification.json`` if all have passed.

    Args:
        folder: an export of ``transmla convert`` or ``transmla heal``.
        source: folder or Hub name of the source. The unchanged weights are compared bit by bit, the config and all
            other files are made again and compared, and each layer is run beside the source's. None: no comparison.
        dtype: precision of the whole model; float32 gives the strictest comparison. Single layers run in float32.
        device: device of the model.
        allow_pickle: whether pickled weights of the source may be opened.

    Yields:
        Each check as soon as it is finished. Checks end early if the hashes are wrong or the export does not load. If
        the folder cannot be written, the last check passes and says so.

    Raises:
        TransmlaError: if ``folder`` is not a finished export, or ``source`` cannot be opened.
    """
    manifest = Manifest.read(folder)
    beside = None
    if source is not None:
        origin = manifest.source
        path = resolve_source(source, revision=origin.commit or origin.revision, allow_pickle=allow_pickle)
        beside = SourceChecks(folder, manifest, path, device, allow_pickle=allow_pickle)
    forget(folder)
    checks: list[Check] = []
    for check in _checks(folder, manifest, beside, dtype, device):
        checks.append(check)
        yield check
        if not check.passed and check.name in ("hashes", "loads"):
            return
    if all(check.passed for check in checks) and (unrecorded := record(folder, manifest, dtype, checks)):
        yield unrecorded


def _checks(
    folder: Path, manifest: Manifest, beside: SourceChecks | None, dtype: torch.dtype, device: str
) -> Iterator[Check]:
    problems = check_hashes(folder, manifest.hashes, free=UNHASHED)
    yield Check("hashes", not problems, "; ".join(problems[:3]) or f"{len(manifest.hashes)} files {_state(manifest)}")
    yield from _attempted("contents as signed", _contents(folder, manifest))
    measured: list[Measured] = []
    yield from _attempted("layers as signed", _layers(folder, manifest, device, measured))

    form = format_named(manifest.format)
    model, problem = _load(folder, form, dtype, device)
    yield Check("loads", model is not None, problem or f"{type(model).__name__}, no missing or extra tensor")
    if model is None:
        return
    yield from _attempted("runs", _model_checks(model, manifest, form, dtype))
    del model
    if beside is not None and manifest.weights_changed:
        yield Check("source", True, "no comparison: other software has changed the weights")
    elif beside is not None:
        yield from _attempted("source", beside.run(measured[0] if measured else None))


def _attempted(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    """Yield ``checks``. An error of a library that stops them is a failed check called ``name``."""
    try:
        yield from checks
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged export makes libraries raise any type
        yield Check(name, False, reason(error))


def _contents(folder: Path, manifest: Manifest) -> Iterator[Check]:
    """Compare config, tokenizer and code with the signature. A healing that is not signed is a problem as well."""
    if manifest.signature is None:
        yield Check("signature", True, "none: an older version wrote this export, so its layers are not compared")
        return
    if manifest.resaved:
        yield Check("contents as signed", True, "no comparison: other software wrote config and tokenizer")
        return
    yield compare_contents(manifest.signature, contents(folder), len(manifest.healing))


def _layers(folder: Path, manifest: Manifest, device: str, measured: list[Measured]) -> Iterator[Check]:
    """Compare each layer with the signature; ``measured`` receives what the layers compute."""
    if manifest.signature is not None and not manifest.weights_changed:
        measured.append(measure_export(folder, manifest.plan.spec.family, device))
        yield compare_layers(manifest.signature, measured[0], experts=bool(manifest.plan.spec.experts))


def _model_checks(model: Any, manifest: Manifest, form: Format, dtype: torch.dtype) -> Iterator[Check]:
    """Check a loaded export."""
    bad = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    yield Check(
        "finite",
        not bad,
        f"{len(bad)} tensors with NaN or Inf, first {bad[0]}" if bad else "all weights finite",
    )
    prompt, changed = _prompt(model), manifest.weights_changed
    signature = None if changed else manifest.signature
    if signature is not None and not signature.rounding:
        detail = "the signature is that of an older version of transmla: convert the source again"
        yield Check("logits as signed", False, detail)
    elif signature is not None:
        limit = _logits_tolerance(signature, dtype, experts=bool(manifest.plan.spec.experts))
        yield beyond_rounding(model, partial(_compare_logits, model, signature, limit))

    def compare() -> Check:
        with torch.no_grad():
            full = model(prompt, use_cache=False).logits
        name, prefill = "cached decode = full forward", prompt.shape[1] // 2
        return compare_decoding(name, model, prompt, full, prefill, changed=changed)

    yield beyond_rounding(model, compare)
    yield _cache_size(model, prompt, manifest.plan)
    yield from (form.changed_checks if changed else form.checks)(model, prompt, dtype)


@torch.no_grad()
def _compare_logits(model: Any, signature: Signature, limit: float) -> Check:
    logits = model(tokens(model.config.vocab_size).to(model.device), use_cache=False).logits
    return compare_logits(signature, project_logits(logits[0]), limit)


def _logits_tolerance(signature: Signature, dtype: torch.dtype, *, experts: bool) -> float:
    """Return the largest deviation of a model in ``dtype`` from its signed logits."""
    if dtype == torch.float32:
        return LOGITS_TOLERANCE
    return max(*rounded_tolerances(signature.rounding), ROUTED_TOLERANCE if experts else 0.0)


def _state(manifest: Manifest) -> str:
    """Return in words what has happened to the files of an export."""
    if not manifest.resaved:
        return "unchanged"
    return f"of other software, {'weights changed' if manifest.weights_changed else 'weights as converted'}"


def _load(folder: Path, form: Format, dtype: torch.dtype, device: str) -> tuple[Any, str]:
    """Return the loaded export and an empty text, or None and the reason for the failure."""
    from transformers import AutoModelForCausalLM

    register()
    try:
        check_config(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **form.load_options(),
        )
    except Exception as error:  # damaged files make loaders raise any type; the check reports it
        return None, f"{type(error).__name__}: {error}"
    model, info = loaded
    wrong = {
        key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    named = [f"{key}: {', '.join(names[:2])}" for key, names in wrong.items() if names]
    return (None, "; ".join(named)) if named else (model.to(device).eval(), "")


def _prompt(model: Any) -> Tensor:
    """Return the test prompt of the cache checks: seeded random tokens (integer [2, T])."""
    length = min(PROMPT_TOKENS, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    return ids.to(model.device)


@torch.no_grad()
def _cache_size(model: Any, prompt: Tensor, plan: Plan) -> Check:
    """Compare the cache's bytes per token after a forward pass with the plan."""
    cache = model(prompt, use_cache=True)[CACHE_ARGUMENT]
    cached = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    measured = sum(t.numel() * t.element_size() / (t.shape[0] * t.shape[2]) for t in cached)
    planned = plan.model_cache_values * model.dtype.itemsize
    # The check runs in float32 by default, and an export in its own precision.
    own = value_bytes(plan.dtype) / model.dtype.itemsize
    wanted = "as planned" if measured == planned else f"{planned * own:,.0f} planned"
    return Check("cache size", measured == planned, f"{measured * own:,.0f} bytes per token in {plan.dtype}, {wanted}")
