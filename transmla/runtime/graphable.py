"""Whether a model's decode step can be captured, and whether a model is still the one that was captured."""

from __future__ import annotations

import operator
import weakref
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from transmla.runtime.absorbed import PLAIN_WEIGHTS, reads_weight
from transmla.runtime.forms import most_absorbed
from transmla.runtime.latent_attention import LATENT_ATTENTION, LatentAttention
from transmla.runtime.shared_frequencies import SharedFrequencies

# Packages whose modules compute with their tensors alone. Modules of others, such as adapters and quantised layers, may
# have switches in Python, which a graph would ignore.
PACKAGES = ("torch", "transformers", "transmla")
# transformers' own quantised and tensor-parallel layers.
INTEGRATIONS = "transformers.integrations"
# transformers installs hooks of this module at the first ``output_hidden_states``. Unless asked, they do nothing.
IDLE_HOOKS = "transformers.utils.output_capturing"
# Follows the last entry of two lists that are compared, so that their lengths are compared as well.
END = object()


class Snapshot:
    """Modules, tensors and hooks of a model, compared at every step: a graph holds addresses, not tensors.

    Attributes:
        device: device of all tensors; None if there are several.
        refusal: why the model cannot be captured, or None.
        most_new: largest number of new tokens for which eager steps use the absorbed form too.
        shared: whether several processes share the caches.
        packed: whether latents are cached as float8.
        windows: whether a layer has a sliding window.
        frequencies: rotary frequencies whose angles a captured step computes once.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        modules = [*model.modules()]
        tables = chain.from_iterable((m._modules, m._parameters, m._buffers) for m in modules)
        self._tables: list[dict[str, Any]] = [table for table in tables if table]
        self._held = [*chain.from_iterable(map(dict.values, self._tables))]
        tensors = [one for one in self._held if isinstance(one, Tensor)]
        # Quantised and sharded tensors, which are refused, have no address.
        self._tensors = [one for one in tensors if type(one) in PLAIN_WEIGHTS]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]
        # Hooks of the model itself run outside of its ``forward``. A reference to the model or its attributes would be
        # a cycle, and the model's memory would be freed late.
        parts = modules[1:]
        self._hooks = [*chain.from_iterable((m._forward_pre_hooks, m._forward_hooks) for m in parts)]
        self._hooked = [*chain.from_iterable(map(dict.values, self._hooks))]
        self._attributes = [m.__dict__ for m in parts]
        devices = {t.device for t in tensors}
        self.device = devices.pop() if len(devices) == 1 else None
        self.refusal = self._refusal(model, modules, plain=len(tensors) == len(self._tensors))
        latent = [m for m in modules if isinstance(m, LatentAttention)]
        kind = "cpu" if self.device is None else self.device.type
        self.most_new = min((most_absorbed(m, kind) for m in latent), default=1)
        self.shared = any(m.ranks.size > 1 for m in latent)
        self.packed = any(m.packed for m in latent)
        self.windows = any(getattr(m, "sliding_window", None) for m in latent)
        self.frequencies = SharedFrequencies([] if self.refusal else parts)

    def in_place(self) -> bool:
        """Return whether all tensors of the snapshot have their memory: else a graph would read freed memory.

        The memory of a tensor that the model no longer has is not freed, because the snapshot has the tensor.
        """
        return [*map(Tensor.data_ptr, self._tensors)] == self._addresses

    def holds(self, model: Any) -> bool:
        """Return whether ``model`` is the same, and so are its modules, tensors, their memory and hooks.

        All loops run in C: 0.1 ms for a model of 8B.
        """
        held = chain.from_iterable(map(dict.values, self._tables))
        hooked = [*chain.from_iterable(map(dict.values, filter(None, self._hooks)))]
        return (
            model is self._model()
            and all(map(operator.is_, chain(held, (END,)), chain(self._held, (END,))))
            and self.in_place()
            and len(hooked) == len(self._hooked)
            and all(map(operator.is_, hooked, self._hooked))
            and not any(map(dict.__contains__, self._attributes, repeat("forward")))
            and not _has_any_global_hook()
        )

    def _refusal(self, model: Any, modules: list[Any], *, plain: bool) -> str | None:
        """Why the decode step of ``model`` with these ``modules`` and ``plain`` tensors cannot be captured, or None."""
        for module in modules:
            home = type(module).__module__
            if home.split(".")[0] not in PACKAGES or home.startswith(INTEGRATIONS):
                return f"{type(module).__name__} is a module of {home}"
            if "forward" in module.__dict__:
                return f"the forward function of a {type(module).__name__} was replaced"
        if _has_any_global_hook() or any(getattr(hook, "__module__", "") != IDLE_HOOKS for hook in self._hooked):
            return "modules have hooks"
        if getattr(model, "hf_quantizer", None) is not None or not plain:
            return "weights are quantised or sharded"
        if self.device is None:
            return "tensors are on several devices"
        layers = [m for m in modules if isinstance(m, LatentAttention)]
        depth = model.config.get_text_config().num_hidden_layers
        if len(layers) != depth:
            return f"{depth - len(layers)} layers kept the source's attention"
        for layer in layers:
            if not reads_weight(layer.kv_b_proj, layer.kv_b_proj.weight.dtype, self.device):
                return "kv_b_proj is quantised, adapted or hooked"
        return None


def refused_mode(model: Any) -> str | None:
    """Return which mode of torch or of ``model`` rules out a graph, or None."""
    if model.training:
        return "the model is in training mode"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return "autocast is enabled"
    return None


def refused_config(model: Any) -> str | None:
    """Return what in the config of ``model`` rules out a graph, or None."""
    config = model.config.get_text_config()
    if any(one.output_hidden_states or one.output_attentions for one in (model.config, config)):
        return "the config asks for hidden states or attention weights"
    if config._attn_implementation != LATENT_ATTENTION:
        return f"the attention is '{config._attn_implementation}'"
    return None
