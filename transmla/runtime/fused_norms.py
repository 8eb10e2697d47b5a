"""Norms of a captured step in one kernel each: a small kernel takes longer to start than to run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from transmla.kernels import rms_norm as kernel
from transmla.kernels.custom_op import current_device

_log = logging.getLogger(__name__)

# Rows on which the kernel is compared with a module, and the largest difference in roundings of the module's dtype.
ROWS, ROUNDINGS = 4, 2


class FusedNorms:
    """The norms of a model that one kernel computes as well.

    A norm counts if its class has the ``forward`` of Llama's, line by line, and if the kernel gives its results.
    """

    def __init__(self, modules: list[Any], device: torch.device) -> None:
        """Find the norms among ``modules`` on ``device``."""
        usable = device.type == "cuda" and kernel.triton is not None
        self.modules = [module for module in modules if usable and agrees(module)]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Return a context in which the norms are computed by the kernel."""
        for module in self.modules:
            module.forward = partial(fused, module)
        try:
            yield
        finally:
            for module in self.modules:
                del module.forward


def fused(module: Any, hidden_states: Tensor) -> Tensor:
    """Compute the norm ``module`` of ``hidden_states`` [..., D] by the kernel.

    Another thread may call this meanwhile with other inputs, which its own ``forward`` computes.
    """
    if torch.is_grad_enabled() or hidden_states.dtype != module.weight.dtype or not hidden_states.is_cuda:
        return type(module).forward(module, hidden_states)  # type: ignore[no-any-return]
    return kernel.rms_norm(hidden_states, module.weight, module.variance_epsilon)


@cache
def is_llama_norm(norm: Any) -> bool:
    """Return whether the class ``norm`` has the code of Llama's, which transformers copies from family to family."""
    if not norm.__name__.endswith("RMSNorm") or norm.__module__.split(".")[0] != "transformers":
        return False
    return inspect.getsource(norm.forward) == inspect.getsource(LlamaRMSNorm.forward)  # type: ignore[attr-defined]


def agrees(module: Any) -> bool:
    """Return whether ``module`` is a norm whose results the kernel gives."""
    norm: Any = type(module)
    if not is_llama_norm(norm):
        return False
    weight = module.weight
    if weight.dim() != 1 or len(weight) > kernel.MAX_WIDTH or not weight.is_contiguous():
        return False
    return _agrees(norm, weight.shape, weight.dtype, weight.device, module.variance_epsilon)


@cache
@torch.no_grad()
def _agrees(norm: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device, eps: float) -> bool:
    """Compare the kernel with a norm of random weights."""
    module = norm(*shape, eps=eps).to(device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    module.weight.data = torch.randn(shape, generator=generator, device=device).to(dtype)
    x = torch.randn(ROWS, *shape, generator=generator, device=device).to(dtype)
    try:
        with current_device(device):
            found, expected = kernel.rms_norm(x, module.weight, eps), module(x)
    except Exception as error:
        _log.info("norms are not fused: %s", error)
        return False
    close = ROUNDINGS * torch.finfo(dtype).eps
    return bool(torch.allclose(found.float(), expected.float(), rtol=close, atol=close))
