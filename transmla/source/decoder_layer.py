"""Build one of a family's decoder layers at a time, and run it with any attention inside.

Everything around the attention (norms, multipliers, MLP, experts) stays the family's code in transformers. Only the
attention's ``forward`` is replaced, so nothing of a family is implemented a second time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transmla.errors import TransmlaError

# Prefix of the attention's tensors in a decoder layer.
ATTENTION = "self_attn."
# Tokens that are embedded at once.
PART = 1024


class _Captured(Exception):
    """Stops a forward pass and carries out the tensor that was captured."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


class Given(nn.Module):
    """Takes a decoder layer's place: runs ``layer`` on ``hidden``. Without one it hands on ``hidden``, or its input."""

    def __init__(self, layer: Any, hidden: Tensor | None) -> None:
        super().__init__()
        self.layer, self.hidden = layer, hidden

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_states if self.hidden is None else self.hidden
        if self.layer is None:
            return hidden
        output = self.layer(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def opened(module: Any) -> Any:
    """Return a shallow copy of ``module`` whose submodules can be replaced without changing ``module``."""
    opened = copy.copy(module)
    opened._modules = dict(module._modules)
    return opened


def layer_with(model: Any, index: int, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Build one decoder layer with its weights.

    Args:
        model: a causal LM without weights: a source, or an export.
        index: number of the layer.
        tensors: the layer's tensors, with their names in the checkpoint relative to the layer.
        dtype: dtype of the layer's parameters.

    Raises:
        TransmlaError: if the tensors do not belong to the layer.
    """
    module = copy.deepcopy(model.model.layers[index])
    loaded = {name: t.to(dtype) for name, t in tensors.items()}
    if set(loaded) != set(module.state_dict()):
        attention = {name: t for name, t in loaded.items() if name.startswith(ATTENTION)}
        others = {name: tensor for name, tensor in tensors.items() if name not in attention}
        loaded = attention | _load_through_transformers(model, index, others, dtype)
        if set(loaded) != set(module.state_dict()):
            raise _mismatch(index, f"its tensors are {', '.join(sorted(set(loaded) ^ set(module.state_dict()))[:2])}")
    module.load_state_dict(loaded, strict=True, assign=True)
    return module.requires_grad_(False)


def _load_through_transformers(
    model: Any, index: int, tensors: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a layer's tensors outside the attention as its module names them.

    ``from_pretrained`` renames the ``tensors`` and stacks experts as for a whole model.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    base: Any = [c for c in type(model.model).__mro__ if issubclass(c, PreTrainedModel)][-2]
    kind = type(model.model.layers[index])

    def build(self: Any, config: Any) -> None:
        base.__init__(self, config)
        self.model = nn.Module()
        layer = kind(config, index)
        del layer.self_attn
        self.model.layers = nn.ModuleList([layer])
        self.post_init()

    # The base's ``__module__``: transformers looks there for what the family's experts support.
    one_layer: Any = type(f"{kind.__name__}Alone", (base,), {"__init__": build, "__module__": base.__module__})
    # transformers finds the old names of an export's tensors by the name of the model's class.
    names = get_checkpoint_conversion_mapping(type(model).__name__)
    if names:
        register_checkpoint_conversion_mapping(one_layer.__name__, names, overwrite=True)
    named = {f"model.layers.0.{name}": tensor.cpu() for name, tensor in tensors.items()}
    try:
        loaded, info = one_layer.from_pretrained(
            None, config=model.config, state_dict=named, dtype=dtype, output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:
        raise _mismatch(index, "the weights of its experts are not complete") from error
    wrong = [f"{key}: {sorted(map(str, info[key]))[0]}" for key in ("missing_keys", "unexpected_keys") if info.get(key)]
    if wrong:
        raise _mismatch(index, "; ".join(wrong).replace("model.layers.0.", ""))
    return dict(loaded.model.layers[0].state_dict())


def _mismatch(index: int, reason: str) -> TransmlaError:
    return TransmlaError(
        f"the tensors of layer {index} do not match its model family",
        limit=reason,
        remedy="download the checkpoint again",
    )


@torch.no_grad()
def embedded(
    model: Any, tokens: Tensor, embedding: Tensor, dtype: torch.dtype = torch.float32, *, into: Tensor | None = None
) -> Tensor:
    """Return the input of the first decoder layer [N, T, D] for token ids [N, T], in float32.

    The family's code runs up to the first layer, so that its multipliers and norms of the embedding apply.

    Args:
        model: the source's causal LM without weights.
        tokens: token ids [N, T].
        embedding: the source's embedding [V, D].
        dtype: precision of the computation.
        into: tensor [N, T, D] for the result; None makes one.
    """
    result = torch.empty(*tokens.shape, embedding.shape[1]) if into is None else into
    trunk = opened(model.model)
    trunk.embed_tokens = copy.deepcopy(model.model.embed_tokens)
    # The embedding is cut to the tokens of a part, so the padding token's index may be out of range.
    trunk.embed_tokens.padding_idx = None
    first = copy.deepcopy(model.model.layers[0])
    first.register_forward_pre_hook(_capture_input)
    trunk.layers = nn.ModuleList([first])
    # In small parts: some families allocate an attention mask [T, T] for each sequence, and no token sees another yet.
    for row, states in zip(tokens, result, strict=True):
        for part, place in zip(row.split(PART), states.split(PART), strict=True):
            words, ids = part.unique(return_inverse=True)
            trunk.embed_tokens.weight = nn.Parameter(embedding[words].to(dtype), requires_grad=False)
            place.copy_(_first_layer_input(trunk, ids[None])[0])
    return result


def _first_layer_input(trunk: Any, tokens: Tensor) -> Tensor:
    try:
        trunk(input_ids=tokens, use_cache=False)
    except _Captured as captured:
        return captured.value.float()
    raise AssertionError("the first layer was not run")


def run_layer(module: Any, hidden: Tensor, attend: Callable[[Tensor], Tensor], *, until: str | None = None) -> Tensor:
    """Run a decoder layer with another attention, and return its output [N, T, D].

    Args:
        module: the decoder layer.
        hidden: hidden states before the layer [N, T, D].
        attend: the attention, from its input [N, T, D] to its output after ``o_proj`` [N, T, D].
        until: name of a submodule. The layer then stops before this submodule, and the result is the submodule's input.
    """
    attention, stop = module.self_attn, None if until is None else module.get_submodule(until)
    attention.forward = lambda hidden_states, **_: (attend(hidden_states), None)
    hook = None if stop is None else stop.register_forward_pre_hook(_capture_input)
    try:
        output = module(hidden, attention_mask=None, position_embeddings=None)
    except _Captured as captured:
        return captured.value
    finally:
        del attention.forward
        if hook is not None:
            hook.remove()
    return output[0] if isinstance(output, tuple) else output


def attention_input(module: Any, hidden: Tensor) -> Tensor:
    """Return the input of a decoder layer's attention [N, T, D] for hidden states before the layer [N, T, D]."""

    def capture(x: Tensor) -> Tensor:
        raise _Captured(x)

    return run_layer(module, hidden, capture)


def _capture_input(_: nn.Module, arguments: tuple[Any, ...]) -> None:
    raise _Captured(arguments[0])
