"""Processes that share the caches of one model: where each holds its copy, and how all generate the same tokens."""

from __future__ import annotations

import functools
import hashlib
import inspect
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessor, LogitsProcessorList

from transmla.errors import TransmlaError
from transmla.ranks import Ranks, launched
from transmla.runtime.latent_attention import LatentAttention
from transmla.runtime.split_cache import grow_cache


def placed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the options ``kwargs`` of ``load`` with this process's own device, if processes share the cache.

    Raises:
        TransmlaError: if the options ask for another device.
    """
    given = kwargs.get("device_map")
    if launched("cpu" if given == "cpu" else "auto").size == 1:
        return kwargs
    if given not in (None, "auto", "cuda", "cpu"):
        raise TransmlaError(
            f"device_map {given!r} was given to several processes",
            limit="each process computes on the GPU of its own number, or on the CPU",
            remedy="leave device_map out, and choose GPUs with CUDA_VISIBLE_DEVICES",
        )
    if "distributed_config" in kwargs or "tp_plan" in kwargs:
        return kwargs
    on_gpu = given != "cpu" and torch.cuda.is_available()
    return kwargs | {"device_map": {"": torch.cuda.current_device() if on_gpu else "cpu"}}


def divides_heads(layers: list[Any]) -> bool:
    """Return whether transformers' tensor parallelism has divided the heads of the attention ``layers``."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for layer in layers for parameter in layer.parameters())


def connect(model: Any, layers: list[Any]) -> Ranks:
    """Connect the processes of this launch, each of which holds the attention ``layers`` of ``model``.

    Raises:
        TransmlaError: if a process holds only some heads, or if the model does not lie on the device that this process
            communicates from.
    """
    ranks = launched("cpu" if model.device.type == "cpu" else "auto")
    if ranks.size == 1:
        return ranks
    if divides_heads(layers):
        raise TransmlaError(
            f"tensor parallelism divides the attention heads of {type(model).__name__}",
            limit="with context_parallel, every process attends with all heads",
            remedy="leave out tp_plan and distributed_config, or set context_parallel=False",
        )
    on_gpu = torch.distributed.get_backend() == "nccl"
    expected = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    if {parameter.device for parameter in model.parameters()} != {expected}:
        raise TransmlaError(
            f"the model of process {ranks.rank} lies on {model.device}",
            limit=f"with context_parallel, this process computes on {expected}",
            remedy="leave device_map out of transmla.load, or move the model there",
        )
    # NCCL connects the processes at the first exchange, which must not be that of a captured step.
    ranks.gather(torch.zeros(1, device=expected))
    return ranks


def share_cache(model: Any, cache: Cache) -> None:
    """Divide the layers of an empty ``cache`` among the processes that share the caches of ``model``.

    The model does this when it first reads the cache. Before, other code may put rows into the layers, each row in all
    processes.
    """
    for module in model.modules():
        if isinstance(module, LatentAttention) and module.ranks.size > 1:
            grow_cache(cache, module.layer_idx, module.ranks, packed=module.packed)


def generate_together(model: Any, ranks: Ranks) -> None:
    """Replace ``generate`` of ``model`` by one that several processes call; one process gets its class's again."""
    if isinstance(model.__dict__.get("generate"), SplitGenerate):
        del model.generate
    if ranks.size > 1:
        model.generate = SplitGenerate(model, ranks)


class ScoresOfFirst(LogitsProcessor):  # type: ignore[misc]
    """Gives all processes the scores of the first one.

    Sums of experts round differently from run to run, on GPUs. Processes that choose different tokens would from then
    on write different texts into one cache.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the first process's ``scores`` [B, vocabulary]."""
        scores = scores.contiguous()
        self.ranks.copy_first(scores)
        return scores


class SplitGenerate:
    """The ``generate`` of one model, which all processes must call with the same input.

    The model holds this object, which refers to the model weakly: deleting the model frees its memory at once.
    """

    def __init__(self, model: Any, ranks: Ranks) -> None:
        self.model, self.ranks = weakref.ref(model), ranks
        functools.update_wrapper(self, type(model).generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, as the model's class does.

        Raises:
            TransmlaError: in all processes, if their arguments differ, or if each would stop by its own clock.
        """
        model: Any = self.model()
        plain = type(model).generate
        given = dict(inspect.signature(plain).bind_partial(model, *args, **kwargs).arguments)
        given.pop("self")
        given |= given.pop("kwargs", {})
        _refuse_clock(model, given)
        self._compare(given, model.device)
        self._share_random_state(model.device)
        own = given.pop("logits_processor", None) or []
        return plain(model, **given, logits_processor=LogitsProcessorList([ScoresOfFirst(self.ranks), *own]))

    def __reduce__(self) -> Any:
        return SplitGenerate, (self.model(), self.ranks)

    def _compare(self, given: dict[str, Any], device: torch.device) -> None:
        """Raise a TransmlaError in all processes if tensors, numbers or words among the arguments ``given`` differ."""
        digest = hashlib.sha256()
        for name, value in sorted(given.items()):
            if isinstance(value, Tensor):
                value = value.cpu().contiguous()
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                # torch cannot view a tensor without dimensions as bytes.
                digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
            elif isinstance(value, (int, float, str)):
                digest.update(f"{name} {value!r}".encode())
        own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(device)
        all_digests = self.ranks.gather(own)
        differs = (all_digests != all_digests[0]).any(-1).nonzero().flatten().tolist()
        if differs:
            raise TransmlaError(
                f"generate() got other arguments in process {differs[0]} than in process 0",
                limit="processes that share a cache write the same text",
                remedy="give the same input_ids, attention_mask and settings in every process",
            )

    def _share_random_state(self, device: torch.device) -> None:
        """Give all processes the first one's random state, so that they sample the same tokens."""
        state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        shared = state.to(device)
        self.ranks.copy_first(shared)
        if device.type == "cuda":
            torch.cuda.set_rng_state(shared.cpu(), device)
        else:
            torch.set_rng_state(shared)


def _refuse_clock(model: Any, given: dict[str, Any]) -> None:
    """Raise a TransmlaError if the arguments ``given`` of ``generate`` or a generation config have a ``max_time``."""
    configs = given.get("generation_config"), model.generation_config
    if given.get("max_time") is not None or any(getattr(config, "max_time", None) is not None for config in configs):
        raise TransmlaError(
            "generate() got max_time with context_parallel",
            limit="a process that stops by its own clock would leave the others waiting",
            remedy="give max_new_tokens instead",
        )
