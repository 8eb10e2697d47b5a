"""Decode steps replayed from CUDA graphs, so that plain ``generate()`` does not wait for the host.

An uncompiled step launches one to three thousand kernels one by one. ``DecodeGraphs`` captures the step of one model on
one GPU, and replays it: one graph for each cache, number of new tokens and kind of mask. The buffers of a
``LatentLayer`` keep their addresses until they are full; then they grow, and the step is captured anew. Every other
step runs as it did before.

The GPU is idle from the moment when a token is known until the next replay. A step that follows a replayed one is
therefore checked briefly before the replay (``NextStep``), and wholly while the GPU works. A replay changes nothing
that counts: if the model turns out to have changed, the step runs again eagerly, on the same rows.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from transmla.modeling.transformers_api import CACHE_ARGUMENT, OLD_CACHE_ARGUMENT
from transmla.runtime.decode_request import (
    MOST_NEW,
    Request,
    latent_layers,
    read_request,
    refused_arguments,
    width_for,
)
from transmla.runtime.graph_recorder import CudaRecorder, Recorder
from transmla.runtime.graphable import Snapshot, refused_config, refused_mode
from transmla.runtime.known_masks import KnownMasks
from transmla.runtime.latent_cache import LatentLayer, make_room
from transmla.runtime.next_step import NextStep
from transmla.runtime.split_cache import SplitLayer
from transmla.runtime.static_steps import StaticRequest, StaticSteps, Way, static_request
from transmla.runtime.step_cache import Step

# Reason given for steps that are no decode steps.
PREFILL = "the step is a prefill"


class DecodeGraphs:
    """Captured decode steps of one model.

    Attributes:
        replays: number of steps that were replayed.
        captures: number of steps that were captured.
        reason: why the last decode step that was not replayed ran eagerly; None if none did.
        masks: attention masks that were read.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        """Capture with ``recorder``; None for CUDA graphs."""
        self.replays = self.captures = 0
        self.reason: str | None = None
        self._recorder = recorder or CudaRecorder()
        self._snapshot: Snapshot | None = None
        self._static = StaticSteps(self._recorder)
        self.masks = KnownMasks()
        self._steps: WeakKeyDictionary[DynamicCache, dict[Any, Step]] = WeakKeyDictionary()
        # The step that follows the last one of a cache, if that was replayed.
        self._next: WeakKeyDictionary[DynamicCache, NextStep] = WeakKeyDictionary()
        # Steps that ran before they were captured, which compiles kernels and allocates workspaces.
        self._rehearsed: set[tuple[Any, ...]] = set()
        # Why a capture failed. Another one is tried once the model has changed.
        self._failure: str | None = None
        self._lock = threading.RLock()

    def forward(self, forward: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``forward(model, *args, **kwargs)``, from a graph if it is a decode step that can be captured."""
        named = kwargs
        if args:
            named = inspect.signature(forward).bind(model, *args, **kwargs).arguments
            named = {name: value for name, value in named.items() if value is not model}
            named |= named.pop("kwargs", {})
        if OLD_CACHE_ARGUMENT != CACHE_ARGUMENT and named.get(OLD_CACHE_ARGUMENT) is not None:
            named = named | {CACHE_ARGUMENT: named[OLD_CACHE_ARGUMENT], OLD_CACHE_ARGUMENT: None}
        with self._lock:
            request: Request | StaticRequest | str | None = self._continued(model, named)
            following = request is not None
            if request is None:
                request = self._read(model, named)
            output = None if isinstance(request, str) else self._advance(forward, model, request, following=following)
            if output is not None:
                return output
            if isinstance(request, str) and request != PREFILL:
                self.reason = request
        return forward(model, *args, **kwargs)

    def __reduce__(self) -> Any:
        """Copy and pickle as graphs that are yet to be captured."""
        return DecodeGraphs, ()

    def _continued(self, model: Any, kwargs: dict[str, Any]) -> Request | None:
        """Return the decode step that the arguments describe if it follows a replayed one, else None."""
        tokens: Any = kwargs.get("input_ids")
        cache: Any = kwargs.get(CACHE_ARGUMENT)
        following = self._next.pop(cache, None) if type(cache) is DynamicCache else None
        if following is None or refused_arguments(kwargs) or not following.fits(cache, tokens):
            return None
        assert self._snapshot is not None
        if self._recorder.refuses(tokens.device) or refused_mode(model) or not self._snapshot.in_place():
            return None
        request = read_request(cache, kwargs, self.masks)
        if isinstance(request, str) or self._steps[cache].get(request.key) is not following.step:
            return None
        return request

    def _read(self, model: Any, kwargs: dict[str, Any]) -> Request | StaticRequest | str:
        """Return the decode step that the arguments describe, or why it has to run eagerly."""
        tokens, cache = kwargs.get("input_ids"), kwargs.get(CACHE_ARGUMENT)
        if tokens is None or cache is None or tokens.ndim != 2 or not 0 < tokens.shape[1] <= MOST_NEW:
            return PREFILL
        if type(cache) not in (DynamicCache, StaticCache):
            return f"the cache is a {type(cache).__name__}"
        if cache.offloading:
            return "the cache is offloaded"
        if type(cache) is DynamicCache and not (cache.layers and cache.get_seq_length()):
            return PREFILL
        refused = (
            self._recorder.refuses(tokens.device)
            or refused_arguments(kwargs)
            or refused_mode(model)
            or refused_config(model)
            or self._refused_model(model)
        )
        if refused:
            return refused
        if isinstance(cache, StaticCache):
            shared = self._snapshot is not None and self._snapshot.shared
            return "processes cannot share a static cache" if shared else static_request(cache, kwargs)
        return self._refused_cache(cache, tokens) or read_request(cache, kwargs, self.masks)

    def _refused_model(self, model: Any) -> str | None:
        """Return why ``model`` cannot be captured, or None. If the model changed, drop all graphs."""
        if self._snapshot is None or not self._snapshot.holds(model):
            self._forget()
            self._snapshot, self._failure = Snapshot(model), None
        return self._snapshot.refusal or self._failure

    def _refused_cache(self, cache: DynamicCache, tokens: Tensor) -> str | None:
        """Return why a step on ``cache`` cannot be captured, or None."""
        assert self._snapshot is not None
        batch, new = tokens.shape
        if new > self._snapshot.most_new:
            return "the expanded form costs less"
        if any(type(layer) not in (LatentLayer, SplitLayer, DynamicLayer) for layer in cache.layers):
            return f"cache layers are {', '.join(sorted({type(layer).__name__ for layer in cache.layers}))}"
        if self._snapshot.windows:
            # A step attends to all rows of its buffers.
            return "layers have sliding windows"
        width, kind = width_for(new), SplitLayer if self._snapshot.shared else LatentLayer
        if not all(type(layer) is kind and layer.has_room(width) for layer in cache.layers):
            # Graphs would keep the memory of the present buffers.
            self._steps.pop(cache, None)
            shared, packed = self._snapshot.shared, self._snapshot.packed
            if shared or not make_room(cache, width, tokens.device, packed=packed):
                return "the rows of the cache cannot be extended in place"
        layers = latent_layers(cache)
        if len({layer.get_seq_length() for layer in layers}) > 1 or layers[0].buffer().shape[0] != batch:
            return "the layers hold different numbers of rows"
        if new > 1 and self._snapshot.shared:
            # Which of its rows a process may show to each new token depends on the length of the cache.
            return "processes share the cache, and there are several new tokens"
        return None

    def _advance(
        self, forward: Callable[..., Any], model: Any, request: Request | StaticRequest, *, following: bool
    ) -> Any:
        """Run the step of ``request`` on fixed memory and return its output; None if this is impossible.

        ``following``: whether the step follows a replayed one, so that the model is yet to be compared.
        """
        assert self._snapshot is not None
        assert self._snapshot.device is not None
        try:
            with self._recorder.turn(self._snapshot.device):
                if isinstance(request, StaticRequest):
                    return self._static_step(forward, model, request)
                return self._step(forward, model, request, following=following)
        except Exception as error:
            if self._snapshot.shared and _may_be_alone(error):
                raise
            # A step on fixed memory changes nothing before ``advance``: the eager step writes the same rows again.
            self._failure = self.reason = f"the step cannot be captured: {error}"
            self._forget()
            return None

    def _step(self, forward: Callable[..., Any], model: Any, request: Request, *, following: bool) -> Any:
        """Run a step over a dynamic cache and return its output; None if the model has changed."""
        assert self._snapshot is not None
        layers, new = request.layers, request.tokens.shape[1]
        steps = self._steps.setdefault(request.cache, {})
        if any(step.rows[i] is not layer.rows for step in steps.values() for i, layer in enumerate(layers)):
            steps.clear()
        step = steps.get(request.key)
        if step is None:
            kind = {"masked": request.mask is not None, "states": request.states}
            step = Step(layers, len(request.tokens), width_for(new), **kind)
            steps[request.key] = step
        step.inputs.fill(request.tokens, request.positions, layers[0].get_seq_length())
        if request.mask is not None and request.prompt is not None:
            step.inputs.show(request.mask, request.prompt)
        self._run(step, request.key, forward, model)
        if following and (refused_config(model) or not self._snapshot.holds(model)):
            self.reason = "the model has changed since the last step"
            return None
        output = step.result(request.cache, new, request.keep)
        for layer in layers:
            layer.advance(new)
        if step.replay is not None and not self._snapshot.shared:
            self._next[request.cache] = NextStep(step, layers, new)
        return output

    def _static_step(self, forward: Callable[..., Any], model: Any, request: StaticRequest) -> Any:
        """Run a step over a static cache and return its output."""
        assert self._snapshot is not None
        output, way = self._static.take(request, partial(forward, model), self._snapshot)
        self.captures += way is Way.CAPTURED
        self.replays += way is not Way.REHEARSED
        return output

    def _run(self, step: Step, key: tuple[Any, ...], forward: Callable[..., Any], model: Any) -> None:
        """Run ``step`` once: rehearse, capture or replay it."""
        assert self._snapshot is not None
        if step.replay is None:
            kind = *key, step.capacity, step.rows[0].dtype
            with self._snapshot.frequencies.used():
                if kind not in self._rehearsed:
                    self._recorder.rehearse(lambda: step.run(forward, model))
                    self._rehearsed.add(kind)
                    return
                step.replay = self._recorder.record(lambda: step.run(forward, model))
            self.captures += 1
        step.replay()
        self.replays += 1

    def _forget(self) -> None:
        """Drop all graphs: the model has changed or a capture failed."""
        self._steps.clear()
        self._static.clear()
        self._next.clear()
        self._rehearsed.clear()


def _may_be_alone(error: Exception) -> bool:
    """Whether one of several processes may have ``error`` alone: its memory is full, or it lost a connection.

    An eager step of this process would then exchange results with another step of the others.
    """
    lost = torch.distributed.is_available() and isinstance(error, torch.distributed.DistError)
    return lost or isinstance(error, torch.OutOfMemoryError)
