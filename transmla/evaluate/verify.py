"""Verify an export: load it through transformers, then check its consistency, its plan and its unchanged weights.

Native exports are loaded by classes of transformers, exports of the transmla format by classes of this package. Code
inside an export never runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.artifacts import Plan
from transmla.evaluate.record import forget, record
from transmla.export.hashes import UNHASHED, check_hashes
from transmla.export.manifest import Manifest
from transmla.formats.base import Format, format_named
from transmla.formats.model_checks import Check, compare_decoding
from transmla.guard.config import check_config
from transmla.modeling.transformers_api import CACHE_ARGUMENT, register
from transmla.source.checkpoint import open_checkpoint
from transmla.source.locate import resolve_source

# Tokens per row of the test prompt.
PROMPT_TOKENS = 96


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
        source: folder or Hub name of the source, to compare the unchanged weights bit by bit; None: no comparison.
        dtype: precision of the model; float32 gives the strictest comparison.
        device: device of the model.
        allow_pickle: whether pickled weights of the source may be opened.

    Yields:
        Each check as soon as it is finished. Checks end early if the hashes are wrong or the export does not load. If
        the folder cannot be written, the last check passes and says so.

    Raises:
        TransmlaError: if ``folder`` is not a finished export.
    """
    manifest = Manifest.read(folder)
    forget(folder)
    checks: list[Check] = []
    for check in _checks(folder, manifest, source, dtype, device, allow_pickle=allow_pickle):
        checks.append(check)
        yield check
        if not check.passed and check.name in ("hashes", "loads"):
            return
    if all(check.passed for check in checks) and (unrecorded := record(folder, manifest, dtype, checks)):
        yield unrecorded


def _checks(
    folder: Path, manifest: Manifest, source: str | None, dtype: torch.dtype, device: str, *, allow_pickle: bool
) -> Iterator[Check]:
    form = format_named(manifest.format)
    problems = check_hashes(folder, manifest.hashes, free=UNHASHED)
    yield Check("hashes", not problems, "; ".join(problems[:3]) or f"{len(manifest.hashes)} files {_state(manifest)}")

    model, problem = _load(folder, form, dtype, device)
    yield Check("loads", model is not None, problem or f"{type(model).__name__}, no missing or extra tensor")
    if model is None:
        return
    bad = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    yield Check(
        "finite",
        not bad,
        f"{len(bad)} tensors with NaN or Inf, first {bad[0]}" if bad else "all weights finite",
    )

    tokens = _prompt(model)
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits
    changed = manifest.weights_changed
    yield compare_decoding("cached decode = full forward", model, tokens, full, tokens.shape[1] // 2, changed=changed)
    yield _cache_size(model, tokens, manifest.plan)
    yield from (form.changed_checks if changed else form.checks)(model, tokens, dtype)
    if source is not None and changed:
        yield Check("untouched weights", True, "no comparison: other software has changed the weights")
    elif source is not None and any(record["settings"]["trainable"] == "all" for record in manifest.healing):
        yield Check("untouched weights", True, "no comparison: a healing trained all weights")
    elif source is not None:
        yield _untouched(folder, source, manifest, form, allow_pickle=allow_pickle)


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
    tokens = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    return tokens.to(model.device)


@torch.no_grad()
def _cache_size(model: Any, tokens: Tensor, plan: Plan) -> Check:
    """Compare the cache's bytes per token after a forward pass with the plan."""
    cache = model(tokens, use_cache=True)[CACHE_ARGUMENT]
    cached = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    measured = sum(t.numel() * t.element_size() / (t.shape[0] * t.shape[2]) for t in cached)
    planned = plan.model_cache_values * model.dtype.itemsize
    return Check(
        "cache size",
        measured == planned,
        f"{measured:,.0f} bytes per token measured, {planned:,} planned ({model.dtype})",
    )


def _untouched(folder: Path, source: str, manifest: Manifest, form: Format, *, allow_pickle: bool) -> Check:
    """Compare each tensor that the conversion does not change with the source's, bit by bit after the cast."""
    origin = manifest.source
    path = resolve_source(source, revision=origin.commit or origin.revision, allow_pickle=allow_pickle)
    original, export = open_checkpoint(path, allow_pickle=allow_pickle), open_checkpoint(folder)
    names = form.untouched(original.shapes, export.shapes, tied=manifest.plan.spec.tie_word_embeddings)
    changed = [
        n
        for n, theirs in names.items()
        if n not in export.shapes or not torch.equal(export.read(n), original.read(theirs).to(export.read(n).dtype))
    ]
    detail = f"{len(changed)} differ, first {changed[0]}" if changed else f"{len(names)} tensors are bit-identical"
    return Check("untouched weights", bool(names) and not changed, detail)
