"""A family's own decoder layer, run with any attention in the place of its own.

What stands around the attention (norms before or after it, multipliers, experts) is the family's code, and nothing of
it is written again here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class _Reached(Exception):
    """Carries what was asked for out of a layer that goes on."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def run_layer(module: Any, hidden: Tensor, attend: Callable[[Tensor], Tensor], *, until: str | None = None) -> Tensor:
    """Run a decoder layer on ``hidden`` [N, T, D] with ``attend`` for its attention; [N, T, D].

    With ``until``, the name of one of its modules, what enters that module is returned, and nothing after it run.
    """
    attention, stop = module.self_attn, None if until is None else module.get_submodule(until)
    attention.forward = lambda hidden_states, **_: (attend(hidden_states), None)
    hook = None if stop is None else stop.register_forward_pre_hook(_leave)
    try:
        output = module(hidden, attention_mask=None, position_embeddings=None)
    except _Reached as reached:
        return reached.value
    finally:
        del attention.forward
        if hook is not None:
            hook.remove()
    return output[0] if isinstance(output, tuple) else output


def attention_input(module: Any, hidden: Tensor) -> Tensor:
    """What the attention of a decoder layer is given for ``hidden``; [N, T, D] → [N, T, D]."""

    def reached(x: Tensor) -> Tensor:
        raise _Reached(x)

    return run_layer(module, hidden, reached)


def _leave(_: nn.Module, arguments: tuple[Any, ...]) -> None:
    raise _Reached(arguments[0])
