"""A decode step over a dynamic cache, as the arguments of a model's ``forward`` describe it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from transmla.modeling.transformers_api import CACHE_ARGUMENT
from transmla.runtime.known_masks import KnownMasks, Prompt
from transmla.runtime.latent_cache import LatentLayer

# Numbers of new tokens of captured steps. A step with another number takes the next larger graph: drafts have many
# lengths, and a capture costs as much as an eager step.
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
MOST_NEW = WIDTHS[-1]
# Arguments of a model's ``forward`` that a step understands, besides the cache. Others must be None or False.
UNDERSTOOD = ("input_ids", "position_ids", "attention_mask", "logits_to_keep", "use_cache", "return_dict")
# Argument that a step understands if it is True. transformers 5.24 takes lists of layers as well.
STATES = "output_hidden_states"


@dataclass(frozen=True)
class Request:
    """One decode step.

    Attributes:
        cache: the cache to extend.
        tokens: token ids [B, n].
        positions: positions [B, n] or [1, n], or None.
        mask: attention mask [B, T + n] if it hides a cached row, else None.
        prompt: what is known of the mask; None if there is none.
        keep: ``logits_to_keep``; 0 for all.
        states: whether the step returns the hidden states of all layers.
    """

    cache: DynamicCache
    tokens: Tensor
    positions: Tensor | None
    mask: Tensor | None
    prompt: Prompt | None
    keep: int
    states: bool

    @property
    def layers(self) -> list[LatentLayer]:
        """Layers of the cache."""
        return latent_layers(self.cache)

    @property
    def key(self) -> tuple[Any, ...]:
        """What a captured step is specific to, besides the buffers of the cache."""
        return len(self.tokens), width_for(self.tokens.shape[1]), self.mask is not None, self.states


def read_request(cache: DynamicCache, kwargs: dict[str, Any], masks: KnownMasks) -> Request | str:
    """Return the step with the tensors in ``kwargs``, or why they have to run eagerly."""
    tokens, positions, mask = kwargs["input_ids"], kwargs.get("position_ids"), kwargs.get("attention_mask")
    keep, (batch, new) = kwargs.get("logits_to_keep"), tokens.shape
    if positions is not None and (positions.ndim != 2 or positions.shape[1] != new):
        return f"position_ids of shape {list(positions.shape)}"
    if mask is not None and (mask.ndim != 2 or tuple(mask.shape) != (batch, cache.get_seq_length() + new)):
        return f"an attention mask of shape {list(mask.shape)}"
    if keep is not None and type(keep) is not int:
        return "logits_to_keep is a tensor"
    prompt = None if mask is None else masks.read(mask)
    hides = prompt is not None and prompt.hides
    return Request(cache, tokens, positions, mask if hides else None, prompt, keep or 0, bool(kwargs.get(STATES)))


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
        if name == STATES and value is True:
            continue
        if name not in UNDERSTOOD and name != CACHE_ARGUMENT and value is not None and value is not False:
            return f"the argument {name}"
    for name in ("use_cache", "return_dict"):
        if kwargs.get(name) is False:
            return f"{name} is False"
    return None
