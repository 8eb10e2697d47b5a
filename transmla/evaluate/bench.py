"""How fast a model decodes.

The cache is filled with random rows up to a length, so that long contexts need no prompt to be read first; then
single tokens are decoded. Speed does not depend on what the rows hold.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from transmla.errors import TransmlaError
from transmla.reporter import Reporter

# Size of the copy whose speed is the memory's, and how often it is timed. Not a power of two, which would have source
# and target meet in the same banks of an H200's memory.
COPY_BYTES = {"cuda": 3 * 2**30, "cpu": 2**28}
REPEATS = 5
WARM_UP, WARMED_TOKENS = 3, 32768


@dataclass(frozen=True)
class Point:
    """One batch at one context: seconds to read the prompt of one sequence, seconds of a decoding step.

    ``cache_bytes`` are those of the rows held; ``bytes_per_second`` are cache and weights over a step's time.
    """

    batch: int
    context: int
    prefill_seconds: float
    step_seconds: float
    cache_bytes: int
    bytes_per_second: float

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.step_seconds


@dataclass(frozen=True)
class Bench:
    """All points of one model; those that did not fit the device are left out."""

    device: str
    dtype: str
    backend: str
    copy_bytes_per_second: float
    points: list[Point]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        points = [asdict(point) | {"tokens_per_second": point.tokens_per_second} for point in self.points]
        return asdict(self) | {"points": points}


def bench(model: Any, *, batches: Sequence[int], contexts: Sequence[int], steps: int = 16, reporter: Reporter) -> Bench:
    """Measure ``model``, loaded by ``transmla.load`` or by transformers, over a grid of batches and contexts.

    On a GPU over a static cache and compiled, as ``generate(cache_implementation="static")`` runs; on a CPU over a
    growing cache, as ``generate()`` runs.

    Raises:
        TransmlaError: if a context is longer than the model's, or no point fits the device.
    """
    from torch._inductor import config as inductor

    longest = model.config.max_position_embeddings - steps - WARM_UP
    if max(contexts) > longest:
        raise TransmlaError(
            f"context {max(contexts)} is too long for this model",
            limit=f"{longest} tokens and the {steps + WARM_UP} that are decoded",
            remedy="choose smaller contexts",
        )
    copied = copy_bandwidth(model.device)
    reporter.stage("decoding", len(batches) * len(contexts))
    points: list[Point] = []
    prefill: dict[int, float] = {}
    for i, (batch, context) in enumerate((b, c) for b in batches for c in contexts):
        try:
            if context not in prefill:
                prefill[context] = prefill_seconds(model, context)
            # One CUDA graph for each size is what is wanted here: no warning of it.
            with inductor.patch({"triton.cudagraph_dynamic_shape_warn_limit": None}):
                points.append(measure(model, batch, context, steps, prefill[context]))
        except torch.OutOfMemoryError:
            reporter.message(f"batch {batch} at {context:,} tokens does not fit {model.device}")
            torch.cuda.empty_cache()
        reporter.advance(i + 1, f"{points[-1].tokens_per_second:,.0f} tokens/s" if points else "")
    if not points:
        raise TransmlaError("nothing was measured", limit="no point fits the device", remedy="choose smaller ones")
    backends = {module.backend.name for module in model.modules() if hasattr(module, "backend")}
    name = ", ".join(sorted(backends)) or "transformers"
    return Bench(str(model.device), str(model.dtype).removeprefix("torch."), name, copied, points)


@torch.no_grad()
def prefill_seconds(model: Any, context: int) -> float:
    """Seconds to read a prompt of ``context`` random tokens."""
    device = model.device
    tokens = torch.randint(model.config.vocab_size, (1, context), device=device)
    # The first prompt also chooses and loads kernels; very long ones take so long that this does not show.
    if context <= WARMED_TOKENS:
        model(tokens, use_cache=True, logits_to_keep=1)
    began = _now(device)
    model(tokens, use_cache=True, logits_to_keep=1)
    return _now(device) - began


@torch.no_grad()
def measure(model: Any, batch: int, context: int, steps: int, prefill: float, *, static: bool | None = None) -> Point:
    """One point; the step is the median of ``steps`` ones. ``static``: compiled over a static cache, as on GPUs."""
    from transformers import CompileConfig, DynamicCache, StaticCache

    from transmla.modeling.transformers_api import CACHE_ARGUMENT

    device = model.device
    compiled = device.type == "cuda" if static is None else static
    cache: Any
    if compiled:
        cache = StaticCache(config=model.config, max_cache_len=context + steps + WARM_UP)
        step = model.get_compiled_call(CompileConfig())
    else:
        cache, step = DynamicCache(config=model.config), model
    _fill(model, cache, batch, context)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    times = []
    for i in range(WARM_UP + steps):
        positions = torch.full((batch, 1), context + i, device=device)
        began = _now(device)
        step(token, position_ids=positions, use_cache=True, **{CACHE_ARGUMENT: cache})
        times.append(_now(device) - began)
    seconds = statistics.median(times[WARM_UP:])
    return Point(batch, context, prefill, seconds, held, (held + _weights_read(model, batch)) / seconds)


def _weights_read(model: Any, batch: int) -> float:
    """Bytes of the weights that a step reads: of experts, no more than the tokens choose."""
    config = model.config
    experts = getattr(config, "n_routed_experts", None) or getattr(config, "num_local_experts", None) or 1
    chosen = min(1.0, batch * getattr(config, "num_experts_per_tok", 1) / experts)
    read = 0.0
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name and not config.tie_word_embeddings:
            continue
        read += parameter.nbytes * (chosen if ".experts." in name else 1)
    return read


def _fill(model: Any, cache: Any, batch: int, length: int) -> None:
    """Let ``cache`` hold ``length`` random rows of every layer for ``batch`` sequences."""
    from transformers import DynamicCache

    from transmla.modeling.transformers_api import CACHE_ARGUMENT

    probe: Any = DynamicCache(config=model.config)
    model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), **{CACHE_ARGUMENT: probe})
    for i, layer in enumerate(probe.layers):
        rows = [
            torch.randn(batch, t.shape[1], length, t.shape[-1], dtype=t.dtype, device=t.device) / 8
            for t in (layer.keys, layer.values)
        ]
        cache.update(*rows, i)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device).fill_(1)
    target = torch.empty_like(source)
    times = []
    for _ in range(REPEATS):
        began = _now(device)
        target.copy_(source)
        times.append(_now(device) - began)
    return 2 * source.nbytes / min(times)


def _now(device: torch.device) -> float:
    """The time when all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
