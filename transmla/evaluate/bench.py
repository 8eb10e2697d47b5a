"""Decoding speed of a model.

The cache is filled with random rows, so that a long context needs no prefill; then single tokens are decoded. The
contents of the rows do not affect the speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from transmla.errors import TransmlaError
from transmla.reporter import Reporter
from transmla.runtime.graphed_model import graphs_of

# Bytes copied to measure the memory bandwidth, by device type. The size on GPUs is not a power of two: otherwise source
# and target would use the same memory banks of an H200.
COPY_BYTES = {"cuda": 3 * 2**30, "cpu": 2**28}
# Number of timed copies; the fastest counts.
REPEATS = 5
# Decoding steps before the timed ones.
WARM_UP = 3
# Longest prompt, in tokens, whose prefill is run once before it is timed.
WARMED_TOKENS = 32768


@dataclass(frozen=True)
class Point:
    """Measurements for one batch size at one context length.

    Attributes:
        batch: sequences.
        context: tokens in the cache, per sequence.
        prefill_seconds: time to prefill one sequence of ``context`` tokens.
        step_seconds: median time of a decoding step.
        cache_bytes: size of the filled cache.
        bytes_per_second: bytes of cache and weights that a step reads, divided by its time.
        new_tokens: tokens that a step decodes, per sequence.
        way: how the steps ran: ``compiled`` over a static cache; as in plain ``generate()`` from a CUDA ``graph``; or
            as in plain ``generate()``, but ``eager``.
        form: how the steps attended to latents: ``absorbed`` or ``expanded``, or both if layers differ; None without
            latents.
        reason: why no graph could be captured, if the model is on a GPU and uses graphs, and ``way`` is ``eager``.
    """

    batch: int
    context: int
    prefill_seconds: float
    step_seconds: float
    cache_bytes: int
    bytes_per_second: float
    new_tokens: int = 1
    way: str = "eager"
    form: str | None = None
    reason: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second, over the whole batch."""
        return self.batch * self.new_tokens / self.step_seconds

    @property
    def what(self) -> tuple[Any, ...]:
        """What was measured: batch, context, new tokens, and whether the steps were compiled."""
        return self.batch, self.context, self.new_tokens, self.way == "compiled"


@dataclass(frozen=True)
class Bench:
    """Measurements of one model.

    Attributes:
        device: device of the model.
        dtype: precision of the model.
        backend: names of the MLA backends, or "transformers".
        copy_bytes_per_second: memory bandwidth of the device, measured with a copy.
        points: one point per batch size, context length, number of new tokens and way, except those that did not fit
            into memory.
    """

    device: str
    dtype: str
    backend: str
    copy_bytes_per_second: float
    points: list[Point]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        points = [asdict(point) | {"tokens_per_second": point.tokens_per_second} for point in self.points]
        return asdict(self) | {"points": points}


def bench(
    model: Any,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    new_tokens: Sequence[int] = (1,),
    steps: int = 16,
    reporter: Reporter,
) -> Bench:
    """Measure a model over a grid of batch sizes, context lengths and numbers of new tokens.

    Steps run as in plain ``generate()``, with a growing cache. On a GPU they are also measured compiled with a static
    cache, as in ``generate(cache_implementation="static")``.

    Args:
        model: a model loaded by ``transmla.load`` or by transformers.
        batches: batch sizes.
        contexts: context lengths, in tokens.
        new_tokens: numbers of tokens that a step decodes, per sequence. Steps that verify drafts decode several.
        steps: timed decoding steps per point.
        reporter: receives the progress.

    Raises:
        TransmlaError: if a context exceeds the model's, or no point fits into the device's memory.
    """
    from torch._inductor import config as inductor

    decoded = (steps + WARM_UP) * max(new_tokens)
    longest = model.config.max_position_embeddings - decoded
    if max(contexts) > longest:
        raise TransmlaError(
            f"context {max(contexts)} is too long for this model",
            limit=f"at most {longest} tokens: {steps} steps, and {WARM_UP} before the timing, decode {decoded} more",
            remedy="choose shorter contexts",
        )
    bandwidth = copy_bandwidth(model.device)
    ways = (True, False) if model.device.type == "cuda" else (False,)
    grid = [*product(batches, contexts, new_tokens, ways)]
    reporter.stage("decoding", len(grid))
    points: list[Point] = []
    prefill: dict[int, float] = {}
    for i, (batch, context, new, compiled) in enumerate(grid):
        try:
            if context not in prefill:
                prefill[context] = prefill_seconds(model, context)
            # The bench needs one CUDA graph per size, so torch's warning about many sizes is switched off.
            with inductor.patch({"triton.cudagraph_dynamic_shape_warn_limit": None}):
                points.append(measure(model, batch, context, steps, prefill[context], new=new, static=compiled))
        except torch.OutOfMemoryError:
            reporter.message(f"batch {batch} at {context:,} tokens does not fit into the memory of {model.device}")
            torch.cuda.empty_cache()
        reporter.advance(i + 1, f"{points[-1].tokens_per_second:,.0f} tokens/s" if points else "")
    if not points:
        raise TransmlaError(
            "nothing was measured",
            limit="no point fits into the device's memory",
            remedy="choose smaller batches or shorter contexts",
        )
    backends = {module.backend.name for module in model.modules() if hasattr(module, "backend")}
    name = ", ".join(sorted(backends)) or "transformers"
    return Bench(str(model.device), str(model.dtype).removeprefix("torch."), name, bandwidth, points)


@torch.no_grad()
def prefill_seconds(model: Any, context: int) -> float:
    """Return the seconds to prefill ``context`` random tokens of one sequence."""
    device = model.device
    tokens = torch.randint(model.config.vocab_size, (1, context), device=device)
    # The first prefill also selects and loads kernels. For longer prompts this time is negligible.
    if context <= WARMED_TOKENS:
        model(tokens, use_cache=True, logits_to_keep=1)
    began = _now(device)
    model(tokens, use_cache=True, logits_to_keep=1)
    return _now(device) - began


@torch.no_grad()
def measure(
    model: Any, batch: int, context: int, steps: int, prefill: float, *, new: int = 1, static: bool | None = None
) -> Point:
    """Measure one point.

    Args:
        model: the model.
        batch: sequences.
        context: tokens in the cache before the first step, per sequence.
        steps: timed decoding steps, whose median counts.
        prefill: seconds of the prefill, which are copied into the point.
        new: tokens that a step decodes, per sequence.
        static: whether to compile the step over a static cache; None: on GPUs only.
    """
    from transformers import CompileConfig, DynamicCache, StaticCache

    from transmla.modeling.transformers_api import CACHE_ARGUMENT
    from transmla.runtime.latent_attention import LatentAttention

    device = model.device
    compiled = device.type == "cuda" if static is None else static
    cache: Any
    if compiled:
        cache = StaticCache(config=model.config, max_cache_len=context + (steps + WARM_UP) * new)
        step = model.get_compiled_call(CompileConfig())
    else:
        cache, step = DynamicCache(config=model.config), model
    fill_cache(model, cache, batch, context)
    cache_bytes = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    tokens = torch.zeros(batch, new, dtype=torch.int64, device=device)
    graphs, replays, times = graphs_of(model), [0], []
    for i in range(WARM_UP + steps):
        positions = (torch.arange(new, device=device) + context + i * new).expand(batch, -1)
        began = _now(device)
        step(tokens, position_ids=positions, use_cache=True, **{CACHE_ARGUMENT: cache})
        times.append(_now(device) - began)
        replays.append(0 if graphs is None else graphs.replays)
    seconds = statistics.median(times[WARM_UP:])
    read = cache_bytes + _weight_bytes_read(model, batch * new)
    # A step that grows the cache is eager, and the next one is captured anew. The median is that of most steps.
    replayed = 2 * (replays[-1] - replays[WARM_UP]) > steps
    way = "compiled" if compiled else "graph" if replayed else "eager"
    reason = graphs.reason if graphs is not None and way == "eager" and device.type == "cuda" else None
    forms = {module.form for module in model.modules() if isinstance(module, LatentAttention) and module.form}
    form = ", ".join(sorted(forms)) or None
    return Point(batch, context, prefill, seconds, cache_bytes, read / seconds, new, way, form, reason)


def _weight_bytes_read(model: Any, tokens: int) -> float:
    """Return the bytes of weights that a step reads; of all experts, at most the number that the tokens select."""
    config = model.config
    experts = getattr(config, "n_routed_experts", None) or getattr(config, "num_local_experts", None) or 1
    chosen = min(1.0, tokens * getattr(config, "num_experts_per_tok", 1) / experts)
    read = 0.0
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name and not config.tie_word_embeddings:
            continue
        read += parameter.nbytes * (chosen if ".experts." in name else 1)
    return read


def fill_cache(model: Any, cache: Any, batch: int, length: int) -> None:
    """Fill ``cache`` with ``length`` random rows per layer and sequence, of which processes keep their shares."""
    from transformers import DynamicCache

    from transmla.modeling.transformers_api import CACHE_ARGUMENT
    from transmla.runtime.context_parallel import share_cache
    from transmla.runtime.latent_attention import LatentAttention, cached_rows
    from transmla.runtime.split_cache import grow_cache

    share_cache(model, cache)
    probe: Any = DynamicCache(config=model.config)
    model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), **{CACHE_ARGUMENT: probe})
    latent = {module.layer_idx: module for module in model.modules() if isinstance(module, LatentAttention)}
    for i, layer in enumerate(probe.layers):
        parts = [layer.keys, layer.values]
        if i in latent and latent[i].packed:
            parts = [part[:, None] for part in cached_rows(latent[i], layer.keys, layer.values, layer).full()]
        rows = [torch.randn(batch, t.shape[1], length, t.shape[-1], dtype=t.dtype, device=t.device) / 8 for t in parts]
        cache.update(*rows, i)
        if i in latent and latent[i].packed:
            grow_cache(cache, i, latent[i].ranks, packed=True)


def copy_bandwidth(device: torch.device) -> float:
    """Return the memory bandwidth in bytes per second, read and written, measured with a large copy."""
    source = torch.empty(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device).fill_(1)
    target = torch.empty_like(source)
    times = []
    for _ in range(REPEATS):
        began = _now(device)
        target.copy_(source)
        times.append(_now(device) - began)
    return 2 * source.nbytes / min(times)


def _now(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
