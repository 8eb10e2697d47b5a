"""Where the time of a token goes in ``generate()``: ``decode_bench.py --generate N`` writes these fields.

    generate() tokens/s        rate of a whole call that writes N tokens behind a filled cache
    first generate() tokens/s  rate of the first such call, which compiles kernels and rehearses the step
    ms before                  time of the call that is not N times ``ms a token``: preparing, and capturing the step
    ms a token                 median time between two tokens
    ms graph                   of that, the GPU's time for the graph
    ms host                    of that, from the moment when the host knows the token to the launch of the next graph
    ms rest                    of that, everything else: launches, and choosing the token from the logits

The last three fields are medians, and only written if steps are replayed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from transmla.evaluate.bench import fill_cache
from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.decode_graphs import DecodeGraphs
from transmla.runtime.graph_recorder import CudaRecorder
from transmla.runtime.graphed_model import graphs_of, use_graphs
from transmla.runtime.latent_attention import LatentAttention
from transmla.runtime.latent_cache import make_room

# Method that ``generate()`` calls before every token, behind the moment when the host knows the last one.
AGAIN = "_has_unfinished_sequences"


class Watch:
    """Recorder that also notes when each replay is launched, and how long it takes.

    Attributes:
        launched: times of the host, in seconds.
    """

    def __init__(self, recorder: Any = None) -> None:
        """Record with ``recorder``; None for CUDA graphs."""
        self.recorder = recorder or CudaRecorder()
        self.launched: list[float] = []
        self._spans: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recorder, name)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture ``function`` and return a function that repeats it and takes notes."""
        replay = self.recorder.record(function)

        def watched() -> None:
            self.launched.append(time.perf_counter())
            began = _mark()
            replay()
            self._spans.append((began, _mark()))

        return watched

    def seconds(self) -> list[float]:
        """Return the duration of each replay, on the GPU if there is one."""
        if not torch.cuda.is_available():
            return [end - began for began, end in self._spans]
        torch.cuda.synchronize()
        return [began.elapsed_time(end) / 1e3 for began, end in self._spans]


def generate_times(model: Any, batch: int, context: int, tokens: int, recorder: Any = None) -> dict[str, float]:
    """Time two calls of ``generate()`` that write ``tokens`` tokens behind ``context`` cached ones.

    Args:
        model: the model. If its steps come from graphs, it gets new ones.
        batch: sequences.
        context: cached tokens of each sequence.
        tokens: tokens to write for each sequence.
        recorder: what captures the steps; None for CUDA graphs.
    """
    watch = None
    if graphs_of(model) is not None:
        watch = Watch(recorder)
        use_graphs(model, DecodeGraphs(watch))
    first, _ = _generate(model, batch, context, tokens)
    launched = 0 if watch is None else len(watch.launched)
    whole, stamps = _generate(model, batch, context, tokens)
    token = statistics.median(later - earlier for earlier, later in pairwise(stamps))
    found = {
        "generate() tokens/s": round(batch * tokens / whole, 1),
        "first generate() tokens/s": round(batch * tokens / first, 1),
        "ms before": round((whole - tokens * token) * 1e3, 1),
        "ms a token": round(token * 1e3, 3),
    }
    if watch is not None and len(watch.launched) > launched:
        graph = statistics.median(watch.seconds()[launched:])
        launches = [launch for launch in watch.launched[launched:] if launch > stamps[0]]
        host = statistics.median(launch - max(t for t in stamps if t < launch) for launch in launches)
        rest = token - graph - host
        found |= {name: round(s * 1e3, 3) for name, s in (("ms graph", graph), ("ms host", host), ("ms rest", rest))}
    return found


@torch.no_grad()
def _filled(model: Any, batch: int, context: int) -> Any:
    """A cache of ``context`` random rows, in the buffers that reading a prompt would have made."""
    cache: Any = DynamicCache(config=model.config)
    fill_cache(model, cache, batch, context)
    latent = [module for module in model.modules() if isinstance(module, LatentAttention)]
    if latent and latent[0].ranks.size == 1:
        make_room(cache, 1, model.device, packed=latent[0].packed)
    return cache


def _generate(model: Any, batch: int, context: int, tokens: int) -> tuple[float, list[float]]:
    """Seconds of a call of ``generate()``, and the host's times at which it asked whether to go on."""
    cache = _filled(model, batch, context)
    # Processes that share a cache write the same text.
    torch.manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (batch, context + 1), device=model.device)
    settings: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    stamps: list[float] = []
    asked = getattr(model, AGAIN)

    def noted(*args: Any, **kwargs: Any) -> Any:
        stamps.append(time.perf_counter())
        return asked(*args, **kwargs)

    setattr(model, AGAIN, noted)
    try:
        began = time.perf_counter()
        written: Tensor = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), **settings, **{CACHE_ARGUMENT: cache}
        )
        written.cpu()
        return time.perf_counter() - began, stamps
    finally:
        delattr(model, AGAIN)


def _mark() -> Any:
    """An event of the GPU, or the host's time if there is none."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
