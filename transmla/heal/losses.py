"""What a student learns from its teacher, computed in chunks so that a large vocabulary fits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, nll_loss
from torch.utils.checkpoint import checkpoint

# Values of one chunk of logits: 2048 positions of a vocabulary of 128 thousand, 1 GiB in float32.
CHUNK_VALUES = 2**28


class Distiller(nn.Module):
    """A student beside its teacher; ``forward`` is the loss.

    One module, so that whatever accelerate wraps around a model (DDP, FSDP, compilation) sees the whole step. The
    teacher is no submodule: nobody shards, saves or trains it.
    """

    def __init__(
        self, student: Any, teacher: Any, *, kl: float, cross_entropy: float, hidden: float, temperature: float
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = [teacher]
        self.kl, self.cross_entropy, self.hidden, self.temperature = kl, cross_entropy, hidden, temperature

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and KL(teacher ‖ student), nats per position, of ``tokens`` [B, T]; the KL without a gradient."""
        deep = self.hidden > 0
        with torch.no_grad():
            theirs = trunk(self.teacher[0])(tokens, use_cache=False, output_hidden_states=deep)
        ours = trunk(self.student)(tokens, use_cache=False, output_hidden_states=deep)
        heads = _head(self.student), _head(self.teacher[0])
        targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1).flatten()
        states = ours.last_hidden_state.flatten(0, 1), theirs.last_hidden_state.flatten(0, 1)
        words = heads[0].weight.shape[0]
        size = max(1, min(len(targets), CHUNK_VALUES // words))
        total = kl = torch.zeros((), device=tokens.device)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            # Logits are computed again in the backward pass instead of being kept.
            chunk = checkpoint(self._chunk, *(s[part] for s in states), targets[part], heads, use_reentrant=False)
            total, kl = total + chunk[0], kl + chunk[1]
        total, kl = total / len(targets), kl / len(targets)
        if deep:
            pairs = zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
            errors = [_relative(mine, other) for mine, other in pairs]
            total = total + self.hidden * torch.stack(errors).mean()
        return total, kl.detach()

    def _chunk(self, mine: Tensor, other: Tensor, targets: Tensor, heads: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        """Sums over a chunk of positions: the weighted loss, and the KL at temperature 1 or the one given."""
        warmth = self.temperature
        student = heads[0](mine).float()
        log_p = (student / warmth).log_softmax(-1)
        with torch.no_grad():
            log_q = (heads[1](other).float() / warmth).log_softmax(-1)
        kl = kl_div(log_p, log_q, reduction="sum", log_target=True)
        # Gradients of softened distributions shrink with the square of the temperature (Hinton et al. 2015).
        total = self.kl * warmth**2 * kl
        if self.cross_entropy:
            logs = log_p if warmth == 1 else student.log_softmax(-1)
            total = total + self.cross_entropy * nll_loss(logs, targets, ignore_index=-100, reduction="sum")
        return total, kl.detach()


def trunk(model: Any) -> Any:
    """The model without its head."""
    return model.get_base_model().model if hasattr(model, "get_base_model") else model.model


def _head(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).lm_head


def _relative(mine: Tensor, other: Tensor) -> Tensor:
    """Squared error of hidden states [B, T, D] against the teacher's energy, token by token, lest sinks be all."""
    difference = (mine.float() - other.float()).square().sum(-1)
    return (difference / other.float().square().sum(-1).clamp_min(1e-12)).mean()
