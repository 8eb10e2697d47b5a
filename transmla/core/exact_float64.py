"""Keep float64 computations in float64, although models' code casts to float32 on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ExactFloat64(TorchFunctionMode):
    """While this context is open, no operation on a float64 tensor casts it to float32; other operands become float64.

    The norms and the softmax of transformers compute in float32, whatever the precision of the model is. Two ways to
    compute the same thing then differ in a bit of float32 somewhere, and massive activations magnify it: absorbed and
    expanded decoding of a Qwen2.5-Coder-0.5B in float64 differed by up to 2e-8 on a CPU, and by 1.9e-4 on a GPU after
    healing. In this context, the difference on a CPU is at most 3e-14.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(_exact(value) for value in args)
            kwargs = {name: _exact(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _exact(value: Any) -> Any:
    # Some operations, such as products of matrices, need operands of one dtype.
    if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return value.double()
    return torch.float64 if value is torch.float32 else value
