"""Compare final hidden states by the next tokens that they predict, one part of the vocabulary's logits at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transmla.families.base import Family
from transmla.source.checkpoint import Checkpoint
from transmla.source.decoder_layer import Given, opened

# Logits in memory at once, of each of two models: 128 MiB in float32.
LOGITS = 2**25


class OutputHead:
    """The last norm and the head of a causal LM, with the family's own code around them.

    Args:
        model: the causal LM without weights.
        checkpoint: reads its weights.
        family: names the tensors.
        device: the device that computes.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, family: Family, device: torch.device) -> None:
        names = family.tensors
        weight = checkpoint.read(names["head"] if names["head"] in checkpoint.shapes else names["embed"])
        self.device, self.tokens = device, max(1, LOGITS // len(weight))
        self.whole, trunk = opened(model), opened(model.model)
        norm = copy.deepcopy(model.model.norm)
        prefix = names["norm"].removesuffix("weight")
        weights = {name: tensor.float() for name, tensor in checkpoint.layer(prefix).items()}
        norm.load_state_dict(weights, strict=True, assign=True)
        trunk.norm, trunk.rotary_emb = norm.to(device), copy.deepcopy(model.model.rotary_emb).to(device)
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        head.weight = nn.Parameter(weight.to(device, torch.float32), requires_grad=False)
        self.whole.lm_head, self.whole.model = head, trunk

    @torch.no_grad()
    def log_probs(self, hidden: Tensor) -> Tensor:
        """Return log-probabilities [N, T, V] of the next tokens for hidden states [N, T, D] after the last layer."""
        hidden = hidden.to(self.device, torch.float32)
        self.whole.model.layers = nn.ModuleList([Given(None, hidden)])
        logits = self.whole(inputs_embeds=hidden, use_cache=False).logits
        return torch.log_softmax(logits.float(), -1)

    def divergence(self, source: Tensor, export: Tensor) -> float:
        """Return the mean KL(source ‖ export) in nats per token, for hidden states [N, T, D] after the last layer."""
        return self.divergences(source, [export])[0]

    @torch.no_grad()
    def divergences(self, source: Tensor, exports: Sequence[Tensor]) -> list[float]:
        """Return ``divergence`` from ``source`` to each of ``exports``, for the price of fewer passes of the head."""
        totals = [0.0] * len(exports)
        for row in range(len(source)):
            for start in range(0, source.shape[1], self.tokens):
                place = (slice(row, row + 1), slice(start, start + self.tokens))
                expected = self.log_probs(source[place])
                weights = expected.exp()
                for k, export in enumerate(exports):
                    difference = expected - self.log_probs(export[place])
                    totals[k] += float(difference.mul_(weights).sum(dtype=torch.float64))
        return [total / (source.shape[0] * source.shape[1]) for total in totals]
