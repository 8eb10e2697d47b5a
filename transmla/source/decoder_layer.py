"""A family's own decoder layers, built one at a time and run with any attention in the place of their own.

What stands around the attention (norms before or after it, multipliers, experts) is the family's code, and nothing of
it is written again here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transmla.errors import TransmlaError


class _Reached(Exception):
    """Carries what was asked for out of a model or layer that would go on."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def layer_with(model: Any, index: int, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Decoder layer ``index`` of a ``model`` without weights, holding ``tensors`` as they are named on disk.

    Raises:
        TransmlaError: if they are not the layer's.
    """
    module = copy.deepcopy(model.model.layers[index])
    if set(tensors) == set(module.state_dict()):
        module.load_state_dict({name: t.to(dtype) for name, t in tensors.items()}, strict=True, assign=True)
    else:
        module = _converted(model, index, tensors, dtype)
    return module.requires_grad_(False)


def _converted(model: Any, index: int, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The layer, when transformers must rename or stack what is on disk (experts), as it does for whole models."""
    from transformers import PreTrainedModel

    base: Any = [c for c in type(model.model).__mro__ if issubclass(c, PreTrainedModel)][-2]
    kind = type(model.model.layers[index])

    def build(self: Any, config: Any) -> None:
        base.__init__(self, config)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([kind(config, index)])
        self.post_init()

    # The module tells transformers what the family's experts can do.
    alone: Any = type(f"{kind.__name__}Alone", (base,), {"__init__": build, "__module__": base.__module__})
    named = {f"model.layers.0.{name}": tensor.cpu() for name, tensor in tensors.items()}
    try:
        found, info = alone.from_pretrained(
            None, config=model.config, state_dict=named, dtype=dtype, output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:
        raise _foreign(index, "what its experts are stacked from is not complete") from error
    wrong = [f"{key}: {sorted(map(str, info[key]))[0]}" for key in ("missing_keys", "unexpected_keys") if info.get(key)]
    if wrong:
        raise _foreign(index, "; ".join(wrong).replace("model.layers.0.", ""))
    return found.model.layers[0].eval()


def _foreign(index: int, reason: str) -> TransmlaError:
    return TransmlaError(
        f"the tensors of layer {index} are not its family's",
        limit=reason,
        remedy="download the checkpoint again",
    )


@torch.no_grad()
def embedded(model: Any, tokens: Tensor, embedding: Tensor) -> Tensor:
    """What enters the first layer of a ``model`` without weights, whose embedding is [V, D]; [N, T] → [N, T, D]."""
    words, tokens = tokens.unique(return_inverse=True)
    trunk = copy.copy(model.model)
    trunk._modules = dict(model.model._modules)
    trunk.embed_tokens = copy.deepcopy(model.model.embed_tokens)
    # Only the rows of these words are there, and padding's may be none of them.
    trunk.embed_tokens.padding_idx = None
    trunk.embed_tokens.weight = nn.Parameter(embedding[words].float(), requires_grad=False)
    first = copy.deepcopy(model.model.layers[0])
    first.register_forward_pre_hook(_leave)
    trunk.layers = nn.ModuleList([first])
    # One sequence at a time: some families make masks as large as its square.
    return torch.cat([_reached(trunk, row[None]) for row in tokens])


def _reached(trunk: Any, row: Tensor) -> Tensor:
    try:
        trunk(input_ids=row, use_cache=False)
    except _Reached as reached:
        return reached.value.float()
    raise AssertionError("the first layer was not run")


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
