"""What a student learns from its teacher, computed in chunks so that a large vocabulary fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
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
        # What is sharded layer by layer, where the file for accelerate does not say.
        self._no_split_modules = list(student._no_split_modules or ())
        self.kl, self.cross_entropy, self.hidden, self.temperature = kl, cross_entropy, hidden, temperature

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and KL(teacher ‖ student), nats per position, of ``tokens`` [B, T]; the KL without a gradient.

        The temperature is one of learning: in evaluation it is 1.
        """
        deep = self.hidden > 0
        with torch.no_grad():
            theirs = trunk(self.teacher[0])(tokens, use_cache=False, output_hidden_states=deep)
        ours = trunk(self.student)(tokens, use_cache=False, output_hidden_states=deep)
        heads = Head.of(self.student), Head.of(self.teacher[0])
        targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1).flatten()
        states = ours.last_hidden_state.flatten(0, 1), theirs.last_hidden_state.flatten(0, 1)
        size = max(1, min(len(targets), CHUNK_VALUES // heads[0].projection.weight.shape[0]))
        sums = torch.zeros(3, device=tokens.device)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            # Logits are computed again in the backward pass instead of being kept.
            chunk = checkpoint(self._chunk, *(s[part] for s in states), targets[part], heads, use_reentrant=False)
            sums = sums + chunk
        counts = torch.tensor([len(targets), (targets >= 0).sum(), len(targets)], device=tokens.device)
        learned, words_missed, kl = sums / counts
        total = self.kl * learned + self.cross_entropy * words_missed
        if deep:
            pairs = zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
            errors = [_relative(mine, other) for mine, other in pairs]
            total = total + self.hidden * torch.stack(errors).mean()
        return total, kl.detach()

    def compile_parts(self) -> None:
        """Compile what is done again and again: a chunk, and the layers of both models, one piece of code each.

        Layers whose hidden states are compared stay as they are: what captures them breaks every graph.
        """
        # Graphs of models before these count towards the same limit.
        torch._dynamo.reset()
        if not self.hidden:
            for layer in (*trunk(self.student).layers, *trunk(self.teacher[0]).layers):
                layer.compile()
        self._chunk = torch.compile(self._chunk)  # type: ignore[method-assign]

    def _chunk(self, mine: Tensor, other: Tensor, targets: Tensor, heads: tuple[Head, Head]) -> Tensor:
        """Sums over a chunk of positions [3]: what the KL adds to the loss, cross-entropy, and the KL itself."""
        warmth = self.temperature if self.training else 1.0
        student = heads[0].logits(mine)
        with torch.no_grad():
            log_q = (heads[1].logits(other) / warmth).log_softmax(-1)
        kl = kl_div((student / warmth).log_softmax(-1), log_q, reduction="sum", log_target=True)
        missed = torch.zeros_like(kl)
        if self.cross_entropy:
            missed = cross_entropy(student, targets, ignore_index=-100, reduction="sum")
        # Gradients of softened distributions shrink with the square of the temperature (Hinton et al. 2015).
        return torch.stack([warmth**2 * kl, missed, kl.detach()])


@dataclass(frozen=True)
class Head:
    """The head of a causal LM, and what its family does to logits: Granite divides them, Gemma caps them."""

    projection: Any
    divisor: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> Head:
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = whole.config
        return cls(
            whole.lm_head, getattr(config, "logits_scaling", 1.0), getattr(config, "final_logit_softcapping", None)
        )

    def logits(self, states: Tensor) -> Tensor:
        """Of hidden states [..., D], in float32; FSDP2's parameters may be of another dtype than what reaches them."""
        logits: Tensor = self.projection(states.to(self.projection.weight.dtype)).float() / self.divisor
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def trunk(model: Any) -> Any:
    """The model without its head."""
    return model.get_base_model().model if hasattr(model, "get_base_model") else model.model


def _relative(mine: Tensor, other: Tensor) -> Tensor:
    """Squared error of hidden states [B, T, D] against the teacher's energy, token by token, lest sinks be all."""
    difference = (mine.float() - other.float()).square().sum(-1)
    return (difference / other.float().square().sum(-1).clamp_min(1e-12)).mean()
