"""Is an export what it says it is? Loaded by transformers, compared with itself and with its plan.

A native export is loaded by stock classes; of the own format no code is run but what transmla itself ships.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from transmla.core.reference_attention import absorbed_attention
from transmla.errors import TransmlaError
from transmla.export.files import write_json
from transmla.export.manifest import CARD, MANIFEST, VERIFICATION, check_hashes, export_fingerprint, read_manifest
from transmla.formats.base import OWN
from transmla.formats.native import RMS_NORM_EPS, export_shape, layer_factors
from transmla.modeling.transformers_api import CACHE, register
from transmla.runtime.load import accelerate
from transmla.source.checkpoint import open_checkpoint
from transmla.source.locate import resolve_source

# Relative difference of logits or attention outputs that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# mean((s·c)²)/eps of the largest token: a hundredth bends the norm by half a percent, bf16's own rounding.
MAX_HEADROOM = 1e-2
PROMPT_TOKENS = 96
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Check:
    """One question, its answer, and the number behind it."""

    name: str
    passed: bool
    detail: str


def verify(
    folder: Path, *, source: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Iterator[Check]:
    """Check an export, yielding each answer as it is found; all passed writes ``verification.json``.

    Args:
        folder: what ``transmla convert`` wrote.
        source: the source, to compare the untouched weights bit for bit.
        dtype: precision the model is run in; float32 gives the sharpest comparison.
        device: where it is run.

    Raises:
        TransmlaError: if ``folder`` is not a finished export.
    """
    manifest = read_manifest(folder / MANIFEST)
    hashes, promise = manifest["hashes"], _Promise.of(manifest)
    (folder / VERIFICATION).unlink(missing_ok=True)
    checks: list[Check] = []
    for check in _checks(folder, hashes, promise, source, dtype, device):
        checks.append(check)
        yield check
        if not check.passed and check.name in ("hashes", "loads"):
            return
    if all(check.passed for check in checks):
        write_json(
            folder / VERIFICATION,
            {
                "passed": True,
                "fingerprint": export_fingerprint(hashes),
                "dtype": str(dtype).removeprefix("torch."),
                "checks": [asdict(check) for check in checks],
            },
        )


@dataclass(frozen=True)
class _Promise:
    """What the manifest says of the export: values cached per token, weights, and where they come from."""

    cached: int
    dtype: torch.dtype
    tied: bool
    revision: str | None
    # Whether a healing changed more than the attention.
    retrained: bool = False
    own: bool = False

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> _Promise:
        try:
            plan, origin = manifest["plan"], manifest["source"]
            spec, shape = plan["spec"], plan["shape"]
            width, own = int(shape["kv_lora_rank"] + shape["qk_rope_head_dim"]), manifest["format"] == OWN
            return cls(
                cached=int(plan["model_cache_values"]) if own else width * int(spec["num_hidden_layers"]),
                dtype=getattr(torch, plan["dtype"]),
                tied=bool(spec["tie_word_embeddings"]),
                revision=origin.get("commit") or origin.get("revision"),
                retrained=any(told["settings"]["trainable"] == "all" for told in manifest.get("healing", [])),
                own=own,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TransmlaError(
                f"{MANIFEST} does not describe a conversion",
                limit=f"{type(error).__name__}: {error}",
                remedy="run `transmla convert` again",
            ) from error


def _checks(
    folder: Path,
    hashes: dict[str, str],
    promise: _Promise,
    source: str | None,
    dtype: torch.dtype,
    device: str,
) -> Iterator[Check]:
    problems = check_hashes(folder, hashes, free=(CARD, MANIFEST, VERIFICATION))
    yield Check("hashes", not problems, "; ".join(problems[:3]) or f"{len(hashes)} files unchanged")

    model, problem = _load(folder, dtype, device, promise)
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
    yield _cache_equals_full(model, tokens, dtype)
    if promise.own:
        yield _cache_size(model, tokens, promise)
        yield _accelerated_equals_plain(model, tokens, dtype)
    else:
        yield _absorbed_equals_expanded(model, tokens, dtype)
        yield _cache_size(model, tokens, promise)
        yield _headroom(model, tokens)
    if source is not None and promise.retrained:
        yield Check("untouched weights", True, "none: a healing trained all of them")
    elif source is not None:
        yield _untouched(folder, source, promise)


def _load(folder: Path, dtype: torch.dtype, device: str, promise: _Promise) -> tuple[Any, str]:
    from transformers import AutoModelForCausalLM

    more = {}
    if promise.own:
        register()
        # Of what families add to their scores, other implementations leave some out.
        more["attn_implementation"] = "eager"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, output_loading_info=True, **more
        )
    except Exception as error:  # whatever a loader raises is the answer to this check
        return None, f"{type(error).__name__}: {error}"
    model, info = loaded
    wrong = {
        key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    named = [f"{key}: {', '.join(names[:2])}" for key, names in wrong.items() if names]
    return (None, "; ".join(named)) if named else (model.to(device).eval(), "")


def _prompt(model: Any) -> Tensor:
    """Two rows of seeded random tokens that the cache checks read."""
    length = min(PROMPT_TOKENS, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    return tokens.to(model.device)


def _relative(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30))


@torch.no_grad()
def _cache_equals_full(model: Any, tokens: Tensor, dtype: torch.dtype) -> Check:
    """Half the prompt at once, the rest token by token, against one full forward."""
    full = model(tokens, use_cache=False).logits
    half = tokens.shape[1] // 2
    out = model(tokens[:, :half], use_cache=True)
    cache, pieces = out[CACHE], [out.logits]
    for i in range(half, tokens.shape[1]):
        pieces.append(model(tokens[:, i : i + 1], use_cache=True, **{CACHE: cache}).logits)
    difference = _relative(torch.cat(pieces, 1), full)
    return Check(
        "cached decode = full forward",
        difference <= TOLERANCE[dtype],
        f"relative difference {difference:.1e}",
    )


@torch.no_grad()
def _observe(model: Any, tokens: Tensor, module: Callable[[Any], Any]) -> list[tuple[Tensor, Tensor]]:
    """(input, output) of ``module(layer)`` in every layer, for one full forward."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        seen.append((x, output[0] if isinstance(output, tuple) else output))

    hooks = [module(layer).register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        model(tokens, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def _absorbed_equals_expanded(model: Any, tokens: Tensor, dtype: torch.dtype) -> Check:
    """Stock expanded attention against absorbed attention in float64 from the same tensors."""
    rotary = model.model.rotary_emb
    gain = float(rotary.attention_scaling) ** 2
    worst = 0.0
    for layer, (x, output) in zip(
        model.model.layers, _observe(model, tokens, lambda layer: layer.self_attn), strict=True
    ):
        tensors = {name: p.detach().cpu() for name, p in layer.self_attn.named_parameters()}
        factors = layer_factors(
            tensors, model.config.num_attention_heads, export_shape(model.config), rotary.inv_freq.double().cpu(), gain
        )
        worst = max(worst, _relative(output.cpu(), absorbed_attention(x.double().cpu(), factors)))
    # Half a headroom's worth of latent norm is part of the export, not an error of it.
    limit = TOLERANCE[dtype] + MAX_HEADROOM / 2
    return Check("absorbed = expanded", worst <= limit, f"largest relative difference {worst:.1e}")


@torch.no_grad()
def _cache_size(model: Any, tokens: Tensor, promise: _Promise) -> Check:
    """Bytes that a real cache holds after a forward, per token held, against the plan."""
    cache = model(tokens, use_cache=True)[CACHE]
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    measured = sum(t.numel() * t.element_size() / (t.shape[0] * t.shape[2]) for t in held)
    planned = promise.cached * model.dtype.itemsize
    return Check(
        "cache size",
        measured == planned,
        f"{measured:,.0f} bytes per token measured, {planned:,} planned ({model.dtype})",
    )


@torch.no_grad()
def _accelerated_equals_plain(model: Any, tokens: Tensor, dtype: torch.dtype) -> Check:
    """Decoding over the latent itself, the last quarter token by token, against expanded keys and values.

    The model stays accelerated.
    """
    plain = model(tokens, use_cache=False).logits
    accelerate(model, backend="torch")
    first = 3 * tokens.shape[1] // 4
    out = model(tokens[:, :first], use_cache=True)
    cache, pieces = out[CACHE], [out.logits]
    for i in range(first, tokens.shape[1]):
        pieces.append(model(tokens[:, i : i + 1], use_cache=True, **{CACHE: cache}).logits)
    difference = _relative(torch.cat(pieces, 1), plain)
    return Check("absorbed = expanded", difference <= TOLERANCE[dtype], f"relative difference {difference:.1e}")


def _headroom(model: Any, tokens: Tensor) -> Check:
    """How close the largest latent comes to bending its norm."""
    seen = _observe(model, tokens, lambda layer: layer.self_attn.kv_a_layernorm)
    worst = max(float(x.float().square().mean(-1).max()) for x, _ in seen) / RMS_NORM_EPS
    return Check("latent norm is an identity", worst <= MAX_HEADROOM, f"largest mean(c²) is {worst:.1e} of eps")


def _untouched(folder: Path, source: str, promise: _Promise) -> Check:
    """Every tensor that the conversion does not change equals the source's, bit for bit after the cast.

    Those are all but the attention, and in a native export the norms.
    """
    trusted = _allows_pickle(folder)
    path = resolve_source(source, revision=promise.revision, allow_pickle=trusted)
    original, export = open_checkpoint(path, allow_pickle=trusted), open_checkpoint(folder)
    names = {n: n for n in original.shapes if ".self_attn." not in n}
    if not promise.own:
        names = {n: n for n in names if "norm" not in n and n in export.shapes}
    if promise.tied and not promise.own:  # the export's head is a copy of the source's embedding
        names[HEAD] = EMBEDDING
    changed = [
        n
        for n, theirs in names.items()
        if n not in export.shapes or not torch.equal(export.read(n), original.read(theirs).to(export.read(n).dtype))
    ]
    detail = f"{len(changed)} differ, first {changed[0]}" if changed else f"{len(names)} tensors bit for bit"
    return Check("untouched weights", bool(names) and not changed, detail)


def _allows_pickle(folder: Path) -> bool:
    """Whether the export was made from a source whose pickled weights its user trusts."""
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(recipe, dict) and recipe.get("allow_pickle") is True
