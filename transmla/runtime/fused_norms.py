"""Norms in one kernel each: transformers' eager code launches eight, and moves nine times the bytes."""

from __future__ import annotations

import inspect
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from transmla.kernels import rms_norm as kernel
from transmla.kernels.custom_op import current_device
from transmla.runtime.absorbed import PLAIN_WEIGHTS
from transmla.runtime.class_swap import class_below, turn_into
from transmla.runtime.expansion import may_write
from transmla.runtime.latent_attention import LATENT_ATTENTION

_log = logging.getLogger(__name__)

# Rows on which the kernel is compared with a module, and the largest difference in roundings of the module's dtype.
ROWS, ROUNDINGS = 4, 2


class FusedNorm(nn.Module):
    """Mixin placed before a family's norm class by ``fused_class``.

    Attributes:
        weight: [D].
        variance_epsilon: added to the mean square.
        fused_config: config of the model. The kernel is used while its attention is ``latent_attention``.
    """

    weight: Tensor
    variance_epsilon: float
    fused_config: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute the norm of ``hidden_states`` [..., D], by the kernel where that is possible."""
        if uses_kernel(self, hidden_states):
            with current_device(hidden_states.device):
                return kernel.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)  # type: ignore[misc,no-any-return]

    def __reduce__(self) -> Any:
        """Pickle the family's class instead of this one, which ``fused_class`` creates at run time."""
        return _bare, (class_below(self, FusedNorm),), self.__dict__


def fuse_norms(model: Any, config: Any) -> None:
    """Make the norms of ``model`` with the code of Llama's compute by the kernel, as long as ``config`` asks for it."""
    for module in model.modules():
        plain: Any = type(module)
        if is_llama_norm(plain):
            turn_into(module, fused_class(plain))
            module.fused_config = config


@cache
def fused_class(plain: Any) -> Any:
    """Return a subclass of the norm class ``plain`` that computes by the kernel.

    Name and module are those of ``plain``, because transformers finds norms by the names of their classes.
    """
    body = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (FusedNorm, plain), body)


def _bare(plain: Any) -> Any:
    """An instance without state, for unpickling."""
    made = fused_class(plain)
    return made.__new__(made)


@cache
def is_llama_norm(norm: Any) -> bool:
    """Return whether the class ``norm`` has the code of Llama's, which transformers copies from family to family."""
    if not norm.__name__.endswith("RMSNorm") or norm.__module__.split(".")[0] != "transformers":
        return False
    return inspect.getsource(norm.forward) == inspect.getsource(LlamaRMSNorm.forward)  # type: ignore[attr-defined]


def uses_kernel(module: Any, hidden_states: Tensor) -> bool:
    """Return whether the kernel may compute the norm ``module`` of ``hidden_states`` [..., D]."""
    weight = module.weight
    return (
        may_write()
        and on_gpu(hidden_states)
        and kernel.triton is not None
        and module.fused_config._attn_implementation == LATENT_ATTENTION
        and not torch.jit.is_tracing()
        and type(hidden_states) is Tensor
        and type(weight) in PLAIN_WEIGHTS
        and hidden_states.dtype == weight.dtype
        and hidden_states.device == weight.device
        and hidden_states.shape[-1:] == weight.shape
        and agrees(module)
    )


def on_gpu(x: Tensor) -> bool:
    """Return whether ``x`` lies on a GPU for which Triton compiles."""
    return x.is_cuda


def agrees(module: Any) -> bool:
    """Return whether the kernel gives the results of ``module``, a fused norm."""
    weight = module.weight
    if weight.dim() != 1 or len(weight) > kernel.MAX_WIDTH or not weight.is_contiguous():
        return False
    return _agrees(class_below(module, FusedNorm), len(weight), weight.dtype, weight.device, module.variance_epsilon)


@cache
@torch.no_grad()
def _agrees(norm: Any, width: int, dtype: torch.dtype, device: torch.device, eps: float) -> bool:
    """Compare the kernel with a norm of random weights."""
    module = norm(width, eps=eps).to(device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    module.weight.data = torch.randn(width, generator=generator, device=device).to(dtype)
    x = torch.randn(ROWS, width, generator=generator, device=device).to(dtype)
    try:
        with current_device(device):
            found, expected = kernel.rms_norm(x, module.weight, eps), module(x)
    except Exception as error:
        _log.info("norms are not fused: %s", error)
        return False
    close = ROUNDINGS * torch.finfo(dtype).eps
    return bool(torch.allclose(found.float(), expected.float(), rtol=close, atol=close))
