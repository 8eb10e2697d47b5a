"""Ask a family's own code what it does to the attention scores of every layer, and check that the parts agree.

transformers makes masks, and the layers of its cache, from fields of the config. A family's attention passes on some
fields and ignores others. So the fields themselves say little; here the model is run, without weights, and observed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transmla.errors import TransmlaError
from transmla.source.decoder_layer import opened

# The observed text has so many tokens. Every layer with a window gets one of two tokens.
TOKENS, WINDOW = 4, 2
# Fields that transformers makes masks and caches from.
FIELDS = (
    "is_causal",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "attention_chunk_size",
    "kv_sharing_modes",
)
_NAME = "transmla_observed"


@dataclass(frozen=True)
class LayerRules:
    """The rules for the attention scores of one layer.

    Attributes:
        mask: which tokens (columns) a query (row) reads, boolean [T, T], in a short text with short windows.
        scaling: factor on the scores.
        softcap: cap of the scores; None without one.
    """

    mask: Tensor
    scaling: float
    softcap: float | None


class _Observed(Exception):
    """Ends a forward pass, and carries the arguments of the attention function."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def read_rules(model: Any) -> list[LayerRules]:
    """Return the rules of every layer of a causal LM, which needs no weights."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, _observe)
    rules: list[LayerRules] = []
    trunk = opened(model.model)
    trunk.config, observed = copy.deepcopy(model.config), copy.deepcopy(model.config)
    trunk.config._attn_implementation, observed._attn_implementation = "eager", _NAME
    if getattr(trunk.config, "sliding_window", None) is not None:
        trunk.config.sliding_window = WINDOW
    count = len(model.model.layers)
    trunk.layers = nn.ModuleList(_observed_layer(layer, observed, rules, count) for layer in model.model.layers)
    try:
        trunk(inputs_embeds=torch.zeros(1, TOKENS, model.config.hidden_size), use_cache=False)
    except _Observed:
        return rules
    raise AssertionError("the last layer was not run")


class _Zeros(nn.Module):
    """Stands for a projection to ``width`` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)


def _observed_layer(layer: Any, config: Any, rules: list[LayerRules], count: int) -> Any:
    """Return a copy of ``layer`` that appends its rules to ``rules``, and ends the pass as the last of ``count``.

    ``config`` is the model's config with ``_observe`` as the attention function.
    """
    attention = copy.copy(layer.self_attn)
    attention.config = config
    # The weights have no values, so projections and norms are left out.
    attention._modules = {
        name: _Zeros(child.out_features) if isinstance(child, nn.Linear) else nn.Identity()
        for name, child in attention.named_children()
    }

    def run(hidden_states: Tensor, attention_mask: Tensor | None = None, **arguments: Any) -> Tensor:
        try:
            attention(hidden_states, attention_mask=None, **arguments)
        except _Observed as observed:
            # To eager attention, no mask means that every token reads every other one.
            mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
            if attention_mask is not None:
                mask = attention_mask[0, 0] if attention_mask.dtype == torch.bool else attention_mask[0, 0] == 0
            passed = observed.arguments
            rules.append(LayerRules(mask, float(passed["scaling"]), passed.get("softcap")))
            if len(rules) == count:
                raise
        return hidden_states

    seen = copy.copy(layer)
    seen.forward = run
    return seen


def _observe(*_: Any, **arguments: Any) -> Any:
    raise _Observed(arguments)


def check_agreement(model: Any, rules: Sequence[LayerRules], windows: Sequence[int | None]) -> None:
    """Check that the mask, the attention and the cache of every layer agree.

    Args:
        model: the source's causal LM without weights.
        rules: the rules of every layer.
        windows: the window of every layer's attention in tokens; None for a layer without one.

    Raises:
        TransmlaError: if a layer's mask is not the causal one with its window, or its cache forgets tokens that its
            attention reads.
    """
    config, positions, caches = model.config, torch.arange(TOKENS), _cached_tokens(model.config)
    distance = positions[:, None] - positions
    for i, (rule, window, kept) in enumerate(zip(rules, windows, caches, strict=True)):
        width = TOKENS if window is None else WINDOW
        own = "no window" if window is None else f"a window of {window} tokens"
        if not torch.equal(rule.mask, (distance >= 0) & (distance < width)):
            raise _disagreement(config, f"the attention of layer {i} has {own}, but its mask is another")
        # A text of the largest length fits into the cache's window.
        if kept is not None and window is None and kept < config.max_position_embeddings:
            raise _disagreement(config, f"the attention of layer {i} has {own}, but its cache keeps {kept} tokens")
        # Layers with one window share a mask, whose width follows from one cache.
        if window is not None and kept != caches[list(windows).index(window)]:
            raise _disagreement(config, f"layers with {own} have different caches")


def _cached_tokens(config: Any) -> list[int | None]:
    """Return how many tokens each layer of transformers' cache keeps; None for all.

    Raises:
        TransmlaError: if a layer of the cache is of another kind, such as one that reads another layer's cache.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=config).layers
    for i, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise _disagreement(config, f"layer {i} has a cache of the kind {type(layer).__name__}")
    # Some versions of transformers make full layers when they are needed.
    return [getattr(layer, "sliding_window", None) for layer in layers] or [None] * config.num_hidden_layers


def _disagreement(config: Any, what: str) -> TransmlaError:
    fields = {name: getattr(config, name, None) for name in FIELDS}
    given = ", ".join(f"{name} {value}" for name, value in fields.items() if value is not None)
    return TransmlaError(
        f"{config.model_type}: {what}",
        limit=f"transformers makes masks and caches from {given}, whatever the attention does",
        remedy="correct these fields in config.json, so that attention, mask and cache agree",
    )
