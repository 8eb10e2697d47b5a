"""Run a model one decoder layer at a time on seeded inputs, and project what it computes.

A layer runs inside its own model's forward pass: the pass makes masks and rotary angles, all other layers hand their
input on. Only one layer has its weights in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from transmla.core.exact_float64 import ExactFloat64
from transmla.families.base import Family
from transmla.signature.probe import NUMBERS, Projections, hidden_states, project, project_logits, tokens
from transmla.source.checkpoint import Checkpoint
from transmla.source.decoder_layer import ATTENTION, Given, embedded, layer_with, opened


@dataclass(frozen=True)
class LayerProjections:
    """Projections of what one layer computes from seeded hidden states: its attention's output, and its change."""

    attention: Projections
    change: Projections


@dataclass(frozen=True)
class RestProjections:
    """Projections of what lies outside the layers, and of the whole model.

    Attributes:
        embedding: of the embedding's weight.
        head: of the head's logits.
        logits: of the whole model's logits.
        rounding: change of these logits if the model runs in bfloat16, as a fraction of their norm, for each group;
            empty if that was not measured.
    """

    embedding: Projections
    head: Projections
    logits: Projections
    rounding: list[float]


def precision(device: torch.device | str) -> torch.dtype:
    """Return the most precise dtype of ``device``."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


class LayerByLayer:
    """A causal LM that is run one decoder layer at a time, in float64 where the device has it.

    Massive activations magnify rounding: between float32 and float64, the layers of Qwen2.5-Coder-0.5B differ by up to
    3.2e-5 of their size, and two devices in float32 may differ as much.

    Args:
        model: the causal LM without weights.
        checkpoint: reads its weights.
        family: names the tensors.
        device: the device that runs the layers.
        rounded: whether the model runs in bfloat16 as well, for ``RestProjections.rounding``.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        family: Family,
        device: torch.device | str,
        *,
        rounded: bool = False,
    ) -> None:
        self.model, self.checkpoint, self.names, self.device = model, checkpoint, family.tensors, device
        self.dtype = precision(device)
        self.count = len(model.model.layers)
        self.rotary = copy.deepcopy(model.model.rotary_emb).to(device)
        states = hidden_states(model.config.hidden_size)
        # The second row is the hidden state of seeded tokens, which passes from layer to layer.
        self.ids = tokens(model.config.vocab_size)
        given = self._embedded()
        self._hidden = torch.cat([states, given]).to(device, self.dtype)
        # Hidden states [1, T, D] of the seeded tokens in a model that runs in bfloat16.
        self._rounded = given.to(device, torch.bfloat16) if rounded else None

    @torch.no_grad()
    def layers(self) -> Iterator[LayerProjections]:
        """Yield the projections of every layer, in order. ``rest`` may be called afterwards."""
        for i in range(self.count):
            tensors = self.checkpoint.layer(self.names["layer"].format(i=i))
            layer = self._layer(i, tensors)
            del tensors
            attended: list[Tensor] = []
            layer.self_attn.register_forward_hook(lambda _, __, out, seen=attended: seen.append(out[0]))
            output = self._run(i, layer, self._hidden)
            if self._rounded is not None:
                self._rounded = self._run(i, layer.to(torch.bfloat16), self._rounded)
            del layer  # before the next one is loaded
            yield LayerProjections(project(attended[0][0]), project((output - self._hidden)[0]))
            self._hidden = torch.stack([self._hidden[0], output[1]])

    @torch.no_grad()
    def rest(self) -> RestProjections:
        """Return the projections of what lies outside the layers, after all layers have run."""
        embedding = self.checkpoint.read(self.names["embed"])
        head = self.checkpoint.read(self.names["head"]) if self.names["head"] in self.checkpoint.shapes else embedding
        logits = self._logits(head, self._hidden)
        exact, rounding = project_logits(logits[1]), list[float]()
        if self._rounded is not None:
            change = project_logits(self._logits(head, self._rounded)[0].to(logits.dtype) - logits[1])
            rounding = [float(error / max(size, 1e-30)) for error, size in zip(change.sizes, exact.sizes, strict=True)]
        return RestProjections(project(embedding), project(logits[0]), exact, rounding)

    def _logits(self, head: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits [N, T, vocabulary] of ``hidden`` [N, T, D] after all layers, in its precision."""
        dtype = hidden.dtype
        whole = opened(self.model)
        whole.lm_head = _Head(head)
        whole.model = self._trunk([Given(None, hidden) for _ in range(self.count)])
        norm = copy.deepcopy(self.model.model.norm)
        prefix = self.names["norm"].removesuffix("weight")
        weights = {name: tensor.to(dtype) for name, tensor in self.checkpoint.layer(prefix).items()}
        norm.load_state_dict(weights, strict=True, assign=True)
        whole.model.norm = norm.to(self.device)
        with ExactFloat64():
            return whole(inputs_embeds=hidden, use_cache=False).logits  # type: ignore[no-any-return]

    def _embedded(self) -> Tensor:
        return embedded(self.model, self.ids, self.checkpoint.read(self.names["embed"]), self.dtype)

    def _layer(self, index: int, tensors: dict[str, Tensor]) -> Any:
        """Return layer ``index`` with its weights ``tensors``, to run in ``ExactFloat64``.

        Matrices outside the attention keep their precision: ``ExactFloat64`` widens each when a product reads it. All
        of a 70B model's layer takes 7 GB in float64, and the largest matrix 2 GB.
        """
        stored = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
        layer = layer_with(self.model, index, tensors, stored if self.dtype == torch.float64 else self.dtype)
        for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
            if value.is_floating_point() and (name.startswith(ATTENTION) or value.dim() < 2):
                value.data = value.data.to(self.dtype)
        return _with_exact_experts(layer).to(self.device)

    def _run(self, index: int, layer: Any, hidden: Tensor) -> Tensor:
        """Run ``layer`` on ``hidden`` [N, T, D] at its place in the model, and return its output [N, T, D]."""
        given = Given(layer, hidden)
        trunk = self._trunk([given if i == index else Given(None, None) for i in range(self.count)])
        trunk.norm = nn.Identity()
        with ExactFloat64():
            return trunk(inputs_embeds=hidden, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def _trunk(self, layers: list[nn.Module]) -> Any:
        """Return the model's decoder with other ``layers``."""
        trunk = opened(self.model.model)
        trunk.layers, trunk.rotary_emb = nn.ModuleList(layers), self.rotary
        return trunk


class _Head(nn.Module):
    """A head [vocabulary, D] that is converted to the precision of the hidden states in blocks, never as a whole."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.tensor = weight

    def forward(self, hidden: Tensor) -> Tensor:
        rows = max(1, NUMBERS // hidden.shape[-1])
        blocks = (block.to(hidden.device, hidden.dtype) for block in self.tensor.split(rows))
        return torch.cat([nn.functional.linear(hidden, block) for block in blocks], dim=-1)


def _with_exact_experts(layer: Any) -> Any:
    """Let a layer's experts run in float64, which only their eager implementation has."""
    for module in layer.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    return layer
