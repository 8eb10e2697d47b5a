"""Decode steps over static caches, captured as they are: a static cache counts its rows on the device.

``generate(cache_implementation="static")`` compiles its steps on a GPU, and compiled steps are not captured here. With
``disable_compile=True``, and in loops that call the model, the GPU would wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.decode_request import STATES
from transmla.runtime.graph_recorder import Recorder
from transmla.runtime.graphable import Snapshot
from transmla.runtime.packed_static import PackedStaticLayer

# Key of the only mask of a model whose layers share one.
ONLY = ""


class Way(Enum):
    """How a step ran."""

    REHEARSED, CAPTURED, REPLAYED = range(3)


@dataclass(frozen=True)
class StaticRequest:
    """One step over a static cache.

    Attributes:
        cache: the cache, which the step extends.
        inputs: token ids [B, n], positions [B, n] or [1, n], and the masks [B, 1, n, capacity] by kind of layer.
        keep: ``logits_to_keep``; 0 for all.
    """

    cache: StaticCache
    inputs: dict[str, Tensor]
    keep: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What a captured step is specific to, besides the memory of the cache."""
        shapes = ((name, t.shape, t.dtype) for name, t in self.inputs.items())
        # Inputs that a step made in inference mode cannot be written outside of it.
        return torch.is_inference_mode_enabled(), *shapes

    @property
    def memory(self) -> list[Tensor]:
        """Tensors of the cache that a step reads and writes."""
        layers: list[Any] = self.cache.layers
        return [t for layer in layers for t in (layer.keys, layer.values, layer.cumulative_length)]


class StaticStep:
    """A step on the memory of one static cache.

    Attributes:
        memory: see ``StaticRequest``; the step is valid as long as the cache has these.
        output: logits and other results of the last run; the next run overwrites them.
        replay: repeats the step; None before the capture.
    """

    def __init__(self, request: StaticRequest) -> None:
        self.memory = request.memory
        self.output: Any = None
        self.replay: Callable[[], None] | None = None
        self._inputs = {name: given.clone() for name, given in request.inputs.items()}

    def fits(self, request: StaticRequest) -> bool:
        """Return whether the cache of ``request`` has the memory of this step."""
        return all(kept is present for kept, present in zip(self.memory, request.memory, strict=True))

    def fill(self, request: StaticRequest) -> None:
        """Write the inputs of the next run."""
        for name, given in request.inputs.items():
            self._inputs[name].copy_(given)

    def run(self, forward: Callable[..., Any], cache: StaticCache) -> None:
        """Run ``forward``, a model's. The step keeps no reference to ``cache``, whose end frees the graph.

        Raises:
            TypeError: if the output holds more than the cache and one tensor of all tokens.
        """
        inputs = {name: t for name, t in self._inputs.items() if name in ("input_ids", "position_ids")}
        masks: Any = {name: t for name, t in self._inputs.items() if name not in inputs}
        masks = masks.get(ONLY, masks)
        fixed = {"attention_mask": masks, "use_cache": True, "return_dict": True, CACHE_ARGUMENT: cache}
        output = forward(**inputs, **fixed)
        output[CACHE_ARGUMENT] = None
        if {name for name, value in output.items() if value is not None} - {"logits", "last_hidden_state"}:
            raise TypeError(f"the model's output has {', '.join(output)}")
        self.output = output

    def result(self, request: StaticRequest) -> Any:
        """Return a copy of ``output`` with the cache of ``request``."""
        kept = {
            name: value[:, -request.keep if name == "logits" else 0 :].clone()
            for name, value in self.output.items()
            if value is not None
        }
        return type(self.output)(**kept, **{CACHE_ARGUMENT: request.cache})


class StaticSteps:
    """Captured steps over static caches of one model."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._steps: WeakKeyDictionary[StaticCache, dict[Any, StaticStep]] = WeakKeyDictionary()

    def clear(self) -> None:
        """Drop all graphs."""
        self._steps.clear()

    def take(self, request: StaticRequest, forward: Callable[..., Any], snapshot: Snapshot) -> tuple[Any, Way]:
        """Run the step of ``request``.

        The first run on any memory is a rehearsal. Beams get new memory at every step, and are never captured.

        Args:
            request: the step.
            forward: ``forward`` of the model.
            snapshot: what is known of the model.

        Returns:
            The output, and how the step ran.
        """
        steps = self._steps.setdefault(request.cache, {})
        if not all(step.fits(request) for step in steps.values()):
            steps.clear()
        step = steps.get(request.key)
        if step is None:
            step = StaticStep(request)
            with snapshot.frequencies.used():
                self._rehearse(step, request, forward)
            steps[request.key] = step
            return step.result(request), Way.REHEARSED
        step.fill(request)
        way = Way.REPLAYED
        if step.replay is None:
            with snapshot.frequencies.used():
                step.replay = self._recorder.record(partial(step.run, forward, request.cache))
            way = Way.CAPTURED
        step.replay()
        return step.result(request), way

    def _rehearse(self, step: StaticStep, request: StaticRequest, forward: Callable[..., Any]) -> None:
        """Run ``step`` before its capture. If this fails, the cache counts the rows that it counted before."""
        counts = [t for t in step.memory if t.ndim == 0]
        before = [count.clone() for count in counts]
        try:
            self._recorder.rehearse(partial(step.run, forward, request.cache))
        except Exception:
            for count, value in zip(counts, before, strict=True):
                count.copy_(value)
            raise


def static_request(cache: StaticCache, kwargs: dict[str, Any]) -> StaticRequest | str:
    """Return the step that the arguments of a model's ``forward`` describe, or why it has to run eagerly."""
    layers: list[Any] = cache.layers
    if any(type(layer) not in (StaticLayer, PackedStaticLayer) for layer in layers):
        return f"cache layers are {', '.join(sorted({type(layer).__name__ for layer in layers}))}"
    if not all(layer.is_initialized for layer in layers):
        return "the static cache is empty"
    tokens, positions, mask = kwargs["input_ids"], kwargs.get("position_ids"), kwargs.get("attention_mask")
    keep, masks = kwargs.get("logits_to_keep"), mask if isinstance(mask, dict) else {ONLY: mask}
    if positions is None or positions.ndim != 2:
        return "a step over a static cache without position_ids"
    if not all(isinstance(part, Tensor) and part.ndim == 4 for part in masks.values()):
        return "a step over a static cache without a mask of four dimensions"
    if keep is not None and type(keep) is not int:
        return "logits_to_keep is a tensor"
    if kwargs.get(STATES):
        return f"a step over a static cache with {STATES}"
    inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": positions, **masks}
    if any(given.device != tokens.device for given in inputs.values()):
        return "inputs are on several devices"
    return StaticRequest(cache, inputs, keep or 0)
