"""Estimate the memory and disk space of a conversion, and the cache size of its export."""

from __future__ import annotations

from typing import Any

import torch

from transmla.artifacts import AttentionSpec, Plan, value_bytes
from transmla.core.methods.base import method_named
from transmla.formats.base import format_named
from transmla.plan.fit_settings import FitSettings
from transmla.source.device import is_fast_in_bfloat16

# Memory sizes of common GPUs, in GB, for which the longest context is shown.
GPU_GIGABYTES = (24, 80, 141)
# Share of a GPU's memory that is available to weights and cache; activations and the allocator need the rest.
USABLE = 0.9
# Resident bytes of a process that has imported torch and transformers (measured: 0.55–0.65 GB).
BASE_MEMORY = 650 * 2**20
# The same for a process that uses a GPU, with CUDA's libraries.
CUDA_MEMORY = 3 * 2**30
CPU = torch.device("cpu")


def parameters(plan: Plan) -> int:
    """Return the number of weights in the export."""
    form = format_named(plan.format)
    layers = plan.spec.num_hidden_layers
    if plan.layer_shapes:
        return sum(form.attention_parameters(plan.at(i)) for i in range(layers)) + form.other_parameters(plan)
    return layers * form.attention_parameters(plan) + form.other_parameters(plan)


def source_parameters(plan: Plan) -> int:
    """Return the number of weights in the source, without biases and norms of the attention."""
    spec = plan.spec
    return spec.num_hidden_layers * projections(spec) + spec.other_parameters


def projections(spec: AttentionSpec) -> int:
    """Return the number of weights in the projections of one source attention."""
    return spec.hidden_size * spec.head_dim * (2 * spec.num_attention_heads + 2 * spec.num_key_value_heads)


def export_bytes(plan: Plan) -> int:
    """Return the size in bytes of the export."""
    return parameters(plan) * value_bytes(plan.dtype)


def disk_bytes(plan: Plan, tokens: int, fit: FitSettings | None, *, streams: int = 0) -> int:
    """Return the peak size in bytes of the unfinished output folder: the export, and two states for a resume.

    A state is the hidden states of the calibration text. A newer one is written before the older one is deleted.

    Args:
        plan: the conversion's plan.
        tokens: number of calibration tokens.
        fit: settings of the fit; None if layers are not fitted.
        streams: number of processes whose hidden states lie in files as well, because the memory does not hold them.
    """
    return export_bytes(plan) + _stream_bytes(plan, tokens, fit) * (1 + streams)


def memory_bytes(
    plan: Plan,
    tokens: int,
    fit: FitSettings | None,
    device: torch.device = CPU,
    *,
    streams: bool = True,
    processes: int = 1,
) -> int:
    """Return the peak resident memory of the conversion in bytes: of all its processes on one computer.

    Every process holds the hidden states of the whole text, and works on whole layers.

    Args:
        plan: the conversion's plan.
        tokens: number of calibration tokens.
        fit: settings of the fit; None if layers are not fitted.
        device: the device that converts. A GPU holds the work on a layer in its own memory.
        streams: whether the memory holds the hidden states; otherwise a disk does.
        processes: number of processes.
    """
    embedding = plan.spec.vocab_size * plan.spec.hidden_size * value_bytes(plan.dtype) * 2
    hidden = _stream_bytes(plan, tokens, fit) if streams else 0
    if device.type == "cuda":
        layer = 2 * _layer_bytes(plan, device)
        return processes * (CUDA_MEMORY + hidden + max(layer, embedding))
    if fit is not None and streams:
        hidden += (fit.window - 1) * 4 * tokens * plan.spec.hidden_size
    return processes * (BASE_MEMORY + hidden + max(_work_bytes(plan, tokens, fit, device), embedding))


def device_bytes(plan: Plan, sequences: int, length: int, fit: FitSettings | None) -> int:
    """Return the peak memory of the conversion on a GPU in bytes, without the hidden states between layers.

    Each GPU of several processes needs as much: it holds all sequences of a fit, and the work on whole layers.

    Args:
        plan: the conversion's plan.
        sequences: number of calibration sequences.
        length: tokens per sequence.
        fit: settings of the fit; None if layers are not fitted.
    """
    closed = _work_bytes(plan, 0, None, torch.device("cuda"))
    return closed if fit is None else max(closed, fit_bytes(plan.spec, sequences, length, fit))


def _layer_bytes(plan: Plan, device: torch.device) -> int:
    """Return the bytes of a source layer's weights on ``device``."""
    width = value_bytes(plan.dtype) if is_fast_in_bfloat16(device) else 4
    return width * (projections(plan.spec) + plan.spec.layer_parameters)


def _work_bytes(plan: Plan, tokens: int, fit: FitSettings | None, device: torch.device) -> int:
    """Return the peak memory of the work on one layer, or on a window of layers that are fitted together, in bytes."""
    spec = plan.spec
    width, layer = spec.hidden_size, _layer_bytes(plan, device)
    # Twice the attention's weights in float64 (a copy, and the per-head key targets), and twelve [F, F] work matrices.
    work = 8 * (2 * _maps(spec) + 12 * spec.features**2)
    if fit is not None:
        # The difference of the source's and the export's hidden states; and for each layer of a window the source's
        # hidden states after the layer, one step's activations, the weights, the gradients and Adam's two moments.
        heads = spec.num_attention_heads * (2 * plan.shape.qk_head_dim + plan.shape.v_head_dim)
        fitting = fit.window * (_activations(spec, fit.tokens, heads) + 4 * 4 * 2 * _maps(spec))
        work = max(work, 4 * tokens * width + fitting) + (fit.window - 1) * layer
    # A layer is signed with its attention in float64, and one of its other matrices at a time.
    exported = format_named(plan.format).attention_parameters(plan)
    signing = 8 * (max(projections(spec), exported) + width * spec.intermediate_size)
    return layer + max(work, signing)


def fit_bytes(spec: AttentionSpec, sequences: int, length: int, fit: FitSettings) -> int:
    """Return the memory of a fit on a GPU in bytes, for heads a quarter wider than the source's.

    These are the hidden states of the source and their differences from the export's. For each layer of a window there
    are one step's activations, the weights, the gradients and Adam's two moments.

    Args:
        spec: the source's attention.
        sequences: number of calibration sequences.
        length: tokens per sequence.
        fit: settings of the fit.
    """
    heads = spec.num_attention_heads * spec.head_dim * 7 // 2
    weights = 4 * (2 * _maps(spec) + spec.layer_parameters) + 4 * 4 * 2 * _maps(spec)
    layer = _activations(spec, max(fit.tokens, length), heads) + weights
    return 2 * 4 * sequences * length * spec.hidden_size + fit.window * layer


def _activations(spec: AttentionSpec, tokens: int, heads: int) -> int:
    """Return the bytes of one layer's activations in a step; ``heads`` counts query, key and value channels."""
    return 4 * tokens * (30 * spec.hidden_size + 4 * heads + 6 * spec.intermediate_size)


def _maps(spec: AttentionSpec) -> int:
    """Return the number of weights in one source attention: maps of the F features to q, k, v; output projection."""
    heads = spec.num_attention_heads
    return spec.head_dim * ((heads + 2 * spec.num_key_value_heads) * spec.features + heads * spec.hidden_size)


def _stream_bytes(plan: Plan, tokens: int, fit: FitSettings | None) -> int:
    """Return the bytes of the streams that enter and leave a layer: of the source, first pass and export, in float32.

    The factors that a window fitted for later layers are saved with them.
    """
    streams = 1 + (method_named(plan.method).first_pass is not None) + (fit is not None)
    ahead = 0 if fit is None else (fit.window - 1) * 4 * format_named(plan.format).attention_parameters(plan)
    return 2 * (streams * 4 * tokens * plan.spec.hidden_size + ahead)


def contexts(plan: Plan) -> dict[int, tuple[int, int]]:
    """Return the longest context, in tokens, whose cache fits a GPU together with the model's weights.

    Returns:
        GPU memory in GB → (tokens of the source, tokens of the export), for one sequence. Both models are in the
        export's precision.
    """
    layers = range(plan.spec.num_hidden_layers)
    windows = [plan.spec.kind(i).window for i in layers]
    before = [plan.spec.cache_values] * len(layers)
    after = [plan.spec.cache_values if i in plan.kept else plan.at(i).shape.cache_values for i in layers]
    longest = {}
    for gigabytes in GPU_GIGABYTES:
        values = USABLE * gigabytes * 1e9 / value_bytes(plan.dtype)
        free = [int(max(0.0, values - weights)) for weights in (source_parameters(plan), parameters(plan))]
        longest[gigabytes] = longest_context(free[0], before, windows), longest_context(free[1], after, windows)
    return longest


def longest_context(free: int, values: list[int], windows: list[int | None]) -> int:
    """Return the number of tokens of one sequence whose cache fits ``free`` values.

    Args:
        free: number of values that fit the memory.
        values: number of values that each layer caches per token.
        windows: length of each layer's sliding window; None for layers that cache all tokens.

    Returns:
        The number of tokens; the longest window if all layers have windows and all windows fit.
    """
    tokens = 0
    for length in (*sorted({window for window in windows if window is not None}), None):
        # Between ``tokens`` and ``length``, the caches of some layers grow; the other layers have filled their windows.
        growing = sum(v for v, window in zip(values, windows, strict=True) if window is None or window > tokens)
        full = sum(v * (w or 0) for v, w in zip(values, windows, strict=True) if w is not None and w <= tokens)
        if not growing:
            break
        reached = (free - full) // growing
        if length is None or reached < length:
            return max(tokens, reached)
        tokens = length
    return tokens


def bytes_per_token(plan: Plan, values: int) -> int:
    """Return the bytes of ``values`` cached values in the export's precision."""
    return values * value_bytes(plan.dtype)


def summary(
    plan: Plan,
    tokens: int,
    fit: FitSettings | None,
    *,
    device: torch.device = CPU,
    reconstruct: str = "off",
    sampled: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Return what ``transmla plan`` shows of shape, memory and disk, as plain values.

    Args:
        plan: the conversion's plan.
        tokens: number of calibration tokens.
        fit: settings of the fit; None if layers are not fitted.
        device: the device that converts.
        reconstruct: name of the fit.
        sampled: size in bytes of the whole model if the model samples its own calibration text; otherwise 0.
        processes: number of processes that share the work on one computer. The first samples.
    """
    memory = memory_bytes(plan, tokens, fit, device, processes=processes)
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
        "source_parameters": source_parameters(plan),
        "parameters": parameters(plan),
        "memory_bytes": max(memory, processes * BASE_MEMORY + sampled),
        "export_bytes": export_bytes(plan),
        "disk_bytes": disk_bytes(plan, tokens, fit),
        "reconstruct": reconstruct,
    }
