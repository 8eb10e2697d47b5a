"""Decode steps replayed from CUDA graphs, so that plain ``generate()`` does not wait for the host.

An uncompiled step launches one to three thousand kernels one by one. ``DecodeGraphs`` captures the step of one model on
one GPU, and replays it: one graph for each cache, number of new tokens and kind of mask. The buffers of a
``LatentLayer`` keep their addresses until they are full; then the step is captured anew. Every other step runs as it
did before.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache

from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.graph_recorder import CudaRecorder, Recorder
from transmla.runtime.graphable import Snapshot, refused_mode
from transmla.runtime.latent_cache import LatentLayer
from transmla.runtime.split_cache import SplitLayer
from transmla.runtime.step_cache import Step

# Numbers of new tokens of captured steps. A step with another number takes the next larger graph: drafts have many
# lengths, and a capture costs as much as an eager step.
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
MOST_NEW = WIDTHS[-1]
# Runs of a step before its capture: they compile kernels, and their results count as any other step's.
REHEARSALS = 1
# Arguments of a model's ``forward`` that a step understands, besides the cache. Others must be None or False.
UNDERSTOOD = ("input_ids", "position_ids", "attention_mask", "logits_to_keep", "use_cache", "return_dict")
# Reason given for steps that are no decode steps.
PREFILL = "the step is a prefill"


@dataclass(frozen=True)
class Request:
    """One decode step.

    Attributes:
        cache: the cache to extend.
        tokens: token ids [B, n].
        positions: positions [B, n] or [1, n], or None.
        mask: attention mask [B, T + n] if it hides a cached row, else None.
        keep: ``logits_to_keep``; 0 for all.
    """

    cache: DynamicCache
    tokens: Tensor
    positions: Tensor | None
    mask: Tensor | None
    keep: int

    @property
    def layers(self) -> list[LatentLayer]:
        """Layers of the cache."""
        return latent_layers(self.cache)

    @property
    def key(self) -> tuple[Any, ...]:
        """What a captured step is specific to, besides the buffers of the cache."""
        return len(self.tokens), width_for(self.tokens.shape[1]), self.mask is not None


class DecodeGraphs:
    """Captured decode steps of one model.

    Attributes:
        replays: number of steps that were replayed.
        captures: number of steps that were captured.
        reason: why the last decode step that was not replayed ran eagerly; None if none did.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        """Capture with ``recorder``; None for CUDA graphs."""
        self.replays = self.captures = 0
        self.reason: str | None = None
        self._recorder = recorder or CudaRecorder()
        self._snapshot: Snapshot | None = None
        self._steps: WeakKeyDictionary[DynamicCache, dict[Any, Step]] = WeakKeyDictionary()
        # Why a capture failed. Another one is tried once the model has changed.
        self._failure: str | None = None
        self._lock = threading.RLock()

    def forward(self, forward: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``forward(model, *args, **kwargs)``, from a graph if it is a decode step that can be captured."""
        with self._lock:
            request = self._read(forward, model, args, kwargs)
            output = None if isinstance(request, str) else self._advance(forward, model, request)
            if output is not None:
                return output
            if isinstance(request, str) and request != PREFILL:
                self.reason = request
        return forward(model, *args, **kwargs)

    def __reduce__(self) -> Any:
        """Copy and pickle as graphs that are yet to be captured."""
        return DecodeGraphs, ()

    def _read(self, forward: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request | str:
        """Return the decode step that the arguments describe, or why it has to run eagerly."""
        if args:
            kwargs = inspect.signature(forward).bind(model, *args, **kwargs).arguments
            kwargs = {name: value for name, value in kwargs.items() if value is not model}
            kwargs |= kwargs.pop("kwargs", {})
        tokens, cache = kwargs.get("input_ids"), kwargs.get(CACHE_ARGUMENT)
        if tokens is None or cache is None or tokens.ndim != 2 or not 0 < tokens.shape[1] <= MOST_NEW:
            return PREFILL
        if type(cache) is not DynamicCache:
            return f"the cache is a {type(cache).__name__}"
        if not cache.layers or not cache.get_seq_length():
            return PREFILL
        return (
            self._recorder.refuses(tokens.device)
            or refused_arguments(kwargs)
            or refused_mode(model)
            or self._refused_model(model)
            or self._refused_cache(cache, tokens)
            or self._request(cache, kwargs)
        )

    def _refused_model(self, model: Any) -> str | None:
        """Return why ``model`` cannot be captured, or None. If the model changed, drop all graphs."""
        if self._snapshot is None or not self._snapshot.holds(model):
            self._steps.clear()
            self._snapshot, self._failure = Snapshot(model), None
        return self._snapshot.refusal or self._failure

    def _refused_cache(self, cache: DynamicCache, tokens: Tensor) -> str | None:
        """Return why a step on ``cache`` cannot be captured, or None."""
        assert self._snapshot is not None
        batch, new = tokens.shape
        if any(type(layer) not in (LatentLayer, SplitLayer) for layer in cache.layers):
            return f"cache layers are {', '.join(sorted({type(layer).__name__ for layer in cache.layers}))}"
        layers = latent_layers(cache)
        if not all(layer.has_room(width_for(new)) for layer in layers):
            # The step will make other buffers. The graphs would keep the memory of the present ones.
            self._steps.pop(cache, None)
            return "a buffer of the cache is full, or its rows were replaced"
        if len({layer.get_seq_length() for layer in layers}) > 1 or layers[0].buffer().shape[0] != batch:
            return "the layers hold different numbers of rows"
        if new > 1 and layers[0].ranks.size > 1:
            # Which of its rows a process may show to each new token depends on the length of the cache.
            return "processes share the cache, and there are several new tokens"
        return "the expanded form costs less" if new > max(1, self._snapshot.most_new) else None

    def _request(self, cache: DynamicCache, kwargs: dict[str, Any]) -> Request | str:
        """Return the step with the tensors in ``kwargs``, or why they have to run eagerly."""
        tokens, positions, mask = kwargs["input_ids"], kwargs.get("position_ids"), kwargs.get("attention_mask")
        keep, (batch, new) = kwargs.get("logits_to_keep"), tokens.shape
        if positions is not None and (positions.ndim != 2 or positions.shape[1] != new):
            return f"position_ids of shape {list(positions.shape)}"
        if mask is not None and (mask.ndim != 2 or tuple(mask.shape) != (batch, cache.get_seq_length() + new)):
            return f"an attention mask of shape {list(mask.shape)}"
        if keep is not None and type(keep) is not int:
            return "logits_to_keep is a tensor"
        return Request(cache, tokens, positions, None if mask is None or bool(mask.all()) else mask, keep or 0)

    def _advance(self, forward: Callable[..., Any], model: Any, request: Request) -> Any:
        """Run the step of ``request`` on fixed memory and return its output; None if this is impossible."""
        assert self._snapshot is not None
        assert self._snapshot.device is not None
        layers, new = request.layers, request.tokens.shape[1]
        steps = self._steps.setdefault(request.cache, {})
        if any(step.rows[i] is not layer.rows for step in steps.values() for i, layer in enumerate(layers)):
            steps.clear()
        try:
            with self._recorder.turn(self._snapshot.device):
                step = steps.get(request.key)
                if step is None:
                    step = Step(layers, len(request.tokens), width_for(new), masked=request.mask is not None)
                    steps[request.key] = step
                cached = layers[0].get_seq_length()
                step.inputs.fill(request.tokens, request.positions, request.mask, cached)
                self._run(step, forward, model)
                output = step.result(request.cache, new, request.keep)
        except Exception as error:
            if layers[0].ranks.size > 1 and _may_be_alone(error):
                raise
            # A step on fixed memory changes nothing before ``advance``: the eager step writes the same rows again.
            self._failure = self.reason = f"the step cannot be captured: {error}"
            self._steps.clear()
            return None
        for layer in layers:
            layer.advance(new)
        return output

    def _run(self, step: Step, forward: Callable[..., Any], model: Any) -> None:
        """Run ``step`` once: rehearse, capture or replay it."""
        assert self._snapshot is not None
        if step.replay is None:
            with self._snapshot.norms.used():
                if step.runs < REHEARSALS:
                    self._recorder.rehearse(lambda: step.run(forward, model))
                    step.runs += 1
                    return
                step.replay = self._recorder.record(lambda: step.run(forward, model))
            self.captures += 1
        step.replay()
        self.replays += 1


def _may_be_alone(error: Exception) -> bool:
    """Whether one of several processes may have ``error`` alone: its memory is full, or it lost a connection.

    An eager step of this process would then exchange results with another step of the others.
    """
    lost = torch.distributed.is_available() and isinstance(error, torch.distributed.DistError)
    return lost or isinstance(error, torch.OutOfMemoryError)


def width_for(new: int) -> int:
    """Return the number of tokens of the graph that takes ``new`` tokens."""
    return next(width for width in WIDTHS if width >= new)


def latent_layers(cache: DynamicCache) -> list[LatentLayer]:
    """Return the layers of ``cache``, all of which are latent ones."""
    layers: list[Any] = cache.layers
    return layers


def refused_arguments(kwargs: dict[str, Any]) -> str | None:
    """Return which argument of a model's ``forward`` rules out a graph, or None."""
    for name, value in kwargs.items():
        if name not in UNDERSTOOD and name != CACHE_ARGUMENT and value is not None and value is not False:
            return f"the argument {name}"
    for name in ("use_cache", "return_dict"):
        if kwargs.get(name) is False:
            return f"{name} is False"
    return None
