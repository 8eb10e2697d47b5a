"""What a conversion and its export will need: bytes, time, and who can run the shape."""

from __future__ import annotations

import time
from typing import Any

import torch

from transmla.artifacts import AttentionSpec, Plan, value_bytes
from transmla.core.methods.base import method_named
from transmla.formats.base import format_named
from transmla.plan.fit_settings import FitSettings

GPU_GIGABYTES = (24, 80, 141)
# Share of a GPU's memory that weights and cache may take; the rest is activations and the allocator.
USABLE = 0.9
# Interpreter, torch and transformers once imported (resident, measured: 0.55–0.65 GB).
BASE_MEMORY = 650 * 2**20


def parameters(plan: Plan) -> int:
    """Number of weights in the export."""
    form = format_named(plan.format)
    return plan.spec.num_hidden_layers * form.attention_parameters(plan) + form.other_parameters(plan)


def disk_bytes(plan: Plan, tokens: int, fit: FitSettings | None) -> int:
    """Largest size of the unfinished folder: the export, and the streams before and after a layer."""
    return parameters(plan) * value_bytes(plan.dtype) + _stream_bytes(plan, tokens, fit)


def memory_bytes(plan: Plan, tokens: int, fit: FitSettings | None, *, held: int = 0) -> int:
    """Peak resident memory of the conversion; ``held`` is the size of a GGUF source that is read whole."""
    spec = plan.spec
    width, d = spec.hidden_size, spec.head_dim
    attention = width * d * (2 * spec.num_attention_heads + 2 * spec.num_key_value_heads)
    layer = 4 * (attention + spec.layer_parameters)
    # float64 copies of the attention's maps, the per-head key targets, and a dozen work matrices of the features
    work = 8 * (2 * _maps(spec) + 12 * spec.features**2)
    if fit is not None:
        # the drift between the streams; of each layer of a window the source's stream behind it, the activations of a
        # step, and weights, gradients and Adam's two moments
        heads = spec.num_attention_heads * (2 * plan.shape.qk_head_dim + plan.shape.v_head_dim)
        activations = 4 * fit.tokens * (30 * width + 4 * heads + 6 * spec.intermediate_size)
        fitting = fit.window * (activations + 4 * 4 * 2 * _maps(spec))
        work = max(work, 4 * tokens * width + fitting) + (fit.window - 1) * (4 * tokens * width + layer)
    embedding = spec.vocab_size * width * (2 if plan.dtype == "bfloat16" else 4) * 2
    return BASE_MEMORY + held + _stream_bytes(plan, tokens, fit) + max(layer + work, embedding)


def _maps(spec: AttentionSpec) -> int:
    """Number of weights of an attention as maps of its features (``frontend``), and of its output projection."""
    heads = spec.num_attention_heads
    return spec.head_dim * ((heads + 2 * spec.num_key_value_heads) * spec.features + heads * spec.hidden_size)


def _stream_bytes(plan: Plan, tokens: int, fit: FitSettings | None) -> int:
    """What enters and leaves a layer: the source's stream, a first phase's, the export's, and factors fitted ahead."""
    streams = 1 + (method_named(plan.method).first_pass is not None) + (fit is not None)
    ahead = 0 if fit is None else (fit.window - 1) * 4 * format_named(plan.format).attention_parameters(plan)
    return 2 * (streams * 4 * tokens * plan.spec.hidden_size + ahead)


def seconds(plan: Plan, tokens: int, device: torch.device, fit: FitSettings | None) -> float:
    """Estimated time of the conversion, from this machine's own matrix rate."""
    spec = plan.spec
    width, d = spec.hidden_size, spec.head_dim
    attention = width * d * (2 * spec.num_attention_heads + 2 * spec.num_key_value_heads)
    mlp = 3 * width * spec.intermediate_size
    forward = 2 * tokens * (attention + mlp + width * width)
    features, heads = spec.features, spec.num_attention_heads + spec.num_key_value_heads
    factor = 30 * features**3 + 8 * features**2 * d * heads
    if fit is not None:
        # the source once, the export forwards and twice backwards; its MLP has no weights to learn
        weights = 5 * attention + (3 * mlp if fit.through_mlp else 0)
        steps = fit.window * fit.steps * fit.tokens
        forward += 2 * steps * weights + 2 * fit.window * tokens * (attention + mlp)
    dtype = torch.bfloat16 if device.type == "cuda" and plan.dtype == "bfloat16" else torch.float32
    return spec.num_hidden_layers * (forward / matrix_rate(device, dtype) + factor / matrix_rate(device, torch.float64))


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Floating-point operations per second of a square matrix product, measured."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def contexts(plan: Plan) -> dict[int, tuple[int, int]]:
    """Tokens of one sequence whose cache a GPU holds beside the export's weights, (before, after), by its gigabytes."""
    weights, layers = parameters(plan) * value_bytes(plan.dtype), range(plan.spec.num_hidden_layers)
    windows = [plan.spec.kind(i).window for i in layers]
    before = [plan.spec.cache_values] * len(layers)
    after = [plan.spec.cache_values if i in plan.kept else plan.at(i).shape.cache_values for i in layers]
    found = {}
    for gigabytes in GPU_GIGABYTES:
        free = int(max(0.0, USABLE * gigabytes * 1e9 - weights) / value_bytes(plan.dtype))
        found[gigabytes] = longest_context(free, before, windows), longest_context(free, after, windows)
    return found


def longest_context(free: int, values: list[int], windows: list[int | None]) -> int:
    """Tokens for which ``free`` values last, where layers cache so many a token, no further back than their windows.

    Where all layers have windows and these fit, the longest window.
    """
    tokens = 0
    for seen in (*sorted({window for window in windows if window is not None}), None):
        # What grows up to here, and what has stopped growing before.
        growing = sum(v for v, window in zip(values, windows, strict=True) if window is None or window > tokens)
        stopped = sum(v * (w or 0) for v, w in zip(values, windows, strict=True) if w is not None and w <= tokens)
        if not growing:
            break
        reached = (free - stopped) // growing
        if seen is None or reached < seen:
            return max(tokens, reached)
        tokens = seen
    return tokens


def bytes_per_token(plan: Plan, values: int) -> int:
    """Cache bytes for ``values`` that all layers together cache of a token."""
    return values * value_bytes(plan.dtype)


def summary(
    plan: Plan,
    tokens: int,
    device: torch.device,
    fit: FitSettings | None,
    *,
    reconstruct: str = "off",
    held: int = 0,
    sampled: int = 0,
) -> dict[str, Any]:
    """Return everything that ``transmla plan`` shows, as plain values.

    Args:
        plan: of the conversion.
        tokens: of calibration text.
        device: that converts.
        fit: how every layer is fitted, if it is.
        reconstruct: the name of that fit.
        held: bytes of a GGUF source, which stay in memory throughout.
        sampled: bytes of the whole model, which is in memory while it writes its own calibration text.
    """
    form = format_named(plan.format)
    before, after = plan.spec.cache_values, plan.shape.cache_values
    return {
        **plan.to_dict(),
        "target": form.target(plan.spec),
        "cache_values": {"before": before, "after": after},
        "cache_bytes_per_token": {
            "before": bytes_per_token(plan, before * plan.spec.num_hidden_layers),
            "after": bytes_per_token(plan, plan.model_cache_values),
        },
        "cache_ratio": plan.cache_ratio,
        "contexts": {str(gb): {"before": b, "after": a} for gb, (b, a) in contexts(plan).items()},
        "runtimes": [vars(runtime) for runtime in form.runtimes(plan)],
        "parameters": parameters(plan),
        "memory_bytes": max(memory_bytes(plan, tokens, fit, held=held), BASE_MEMORY + held + sampled),
        "disk_bytes": disk_bytes(plan, tokens, fit),
        "seconds": seconds(plan, tokens, device, fit),
        "device": str(device),
        "reconstruct": reconstruct,
    }
