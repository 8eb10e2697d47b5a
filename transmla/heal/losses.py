"""Distillation loss, computed in chunks of positions so that the logits of a large vocabulary fit in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

# Largest number of logits in one chunk: 2048 positions of a 128k vocabulary, 1 GiB in float32.
CHUNK_VALUES = 2**28


class Distiller(nn.Module):
    """A student with its teacher; ``forward`` returns the loss.

    Student and loss are one module, so that a wrapper of accelerate (DDP, FSDP, compilation) contains the whole step.
    The teacher is kept in a list and is not a submodule, so it is never sharded, saved or trained.
    """

    def __init__(
        self, student: Any, teacher: Any, *, kl: float, cross_entropy: float, hidden: float, temperature: float
    ) -> None:
        """Keep both models and the weights of the loss.

        Args:
            student: a causal LM, or a peft model around one.
            teacher: a causal LM with the same vocabulary.
            kl: weight of KL(teacher ‖ student).
            cross_entropy: weight of the cross-entropy with the text's next tokens.
            hidden: weight of the relative squared error of the hidden states.
            temperature: softmax temperature of both models in the KL, during training.
        """
        super().__init__()
        self.student = student
        self.teacher = [teacher]
        # FSDP wraps these classes if accelerate's configuration names none.
        self._no_split_modules = list(student._no_split_modules or ())
        self.kl, self.cross_entropy, self.hidden, self.temperature = kl, cross_entropy, hidden, temperature

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss and KL(teacher ‖ student) of ``tokens`` [B, T].

        The temperature applies in training mode only; in evaluation mode it is 1.

        Returns:
            The loss (a scalar) and the KL in nats per position (a scalar, without gradient).
        """
        with_hidden = self.hidden > 0
        with torch.no_grad():
            taught = trunk(self.teacher[0])(tokens, use_cache=False, output_hidden_states=with_hidden)
        learned = trunk(self.student)(tokens, use_cache=False, output_hidden_states=with_hidden)
        targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1).flatten()
        total, kl = self._logits_loss(
            learned.last_hidden_state.flatten(0, 1), taught.last_hidden_state.flatten(0, 1), targets
        )
        if with_hidden:
            pairs = zip(learned.hidden_states[1:], taught.hidden_states[1:], strict=True)
            errors = [_relative_error(student, teacher) for student, teacher in pairs]
            total = total + self.hidden * torch.stack(errors).mean()
        return total, kl

    def _logits_loss(self, learned: Tensor, taught: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of the logits, and KL(teacher ‖ student) in nats per position without gradient; both scalars.

        The logits of all positions are too large to keep for the backward pass. The gradients are therefore computed
        with the loss, chunk by chunk, and the backward pass only scales them.

        Args:
            learned: the student's last hidden states [N, D_s].
            taught: the teacher's last hidden states [N, D_t].
            targets: next tokens [N]; -100 for none.
        """
        heads = Head.of(self.student), Head.of(self.teacher[0])
        sums = torch.zeros(3, device=targets.device)
        # The host never waits for the device here.
        scale = torch.stack(
            [sums.new_full((), self.kl / len(targets)), self.cross_entropy / (targets >= 0).sum(), sums.new_zeros(())]
        )
        with_gradients = torch.is_grad_enabled() and learned.requires_grad
        weights = [p for p in heads[0].projection.parameters() if p.requires_grad] if with_gradients else []
        by_states, by_weights = list[Tensor](), list[Tensor]()
        size = max(1, min(len(targets), CHUNK_VALUES // heads[0].projection.weight.shape[0]))
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            states = learned[part].detach().requires_grad_(with_gradients)
            chunk = self._chunk(states, taught[part], targets[part], heads)
            sums = sums + chunk.detach()
            if with_gradients:
                first, *rest = torch.autograd.grad((scale * chunk).sum(), [states, *weights])
                by_states.append(first)
                by_weights = [a.add_(b) for a, b in zip(by_weights, rest, strict=True)] if by_weights else rest
        kl, total = sums[2] / len(targets), (scale * sums).sum()
        if with_gradients:
            total = _WithGradients.apply(total, [torch.cat(by_states), *by_weights], learned, *weights)
        return total, kl

    def compile_parts(self) -> None:
        """Compile the repeated parts: the loss of a chunk, and each layer of both models.

        Layers are not compiled if ``hidden`` is positive: transformers' capture of hidden states breaks every graph.
        """
        # torch limits the number of compiled graphs, and earlier models' graphs would count.
        torch._dynamo.reset()
        if not self.hidden:
            for layer in (*trunk(self.student).layers, *trunk(self.teacher[0]).layers):
                layer.compile()
        self._chunk = torch.compile(self._chunk)  # type: ignore[method-assign]

    def _chunk(
        self, student_states: Tensor, teacher_states: Tensor, targets: Tensor, heads: tuple[Head, Head]
    ) -> Tensor:
        """Return three sums [3] over a chunk of N positions: the KL's loss term, the cross-entropy, and the KL.

        ``student_states`` [N, D_s] and ``teacher_states`` [N, D_t] are last hidden states, ``targets`` [N] are next
        tokens (-100: none), ``heads`` are the student's and the teacher's.
        """
        temperature = self.temperature if self.training else 1.0
        student = heads[0].logits(student_states)
        with torch.no_grad():
            log_q = (heads[1].logits(teacher_states) / temperature).log_softmax(-1)
        kl = kl_div((student / temperature).log_softmax(-1), log_q, reduction="sum", log_target=True)
        token_loss = torch.zeros_like(kl)
        if self.cross_entropy:
            token_loss = cross_entropy(student, targets, ignore_index=-100, reduction="sum")
        # Gradients of softened distributions shrink with the square of the temperature (Hinton et al. 2015).
        return torch.stack([temperature**2 * kl, token_loss, kl.detach()])


@dataclass(frozen=True)
class Head:
    """The head of a causal LM, with the operations that its family applies to logits.

    Attributes:
        projection: ``lm_head``, with weight [V, D].
        divisor: divisor of the logits (Granite).
        softcap: cap of the logits (Gemma), or None.
    """

    projection: Any
    divisor: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> Head:
        """Return the head of a causal LM, or of the LM inside a peft model."""
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = causal_lm.config
        return cls(
            causal_lm.lm_head, getattr(config, "logits_scaling", 1.0), getattr(config, "final_logit_softcapping", None)
        )

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., D], in float32."""
        # Under FSDP2, the head's dtype may differ from the dtype of the hidden states.
        logits: Tensor = self.projection(states.to(self.projection.weight.dtype)).float() / self.divisor
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients with respect to its inputs are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        """Return the ``loss`` of the ``inputs``, whose gradients are ``gradients``."""
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        """Return the gradients, scaled in place by that of the loss."""
        return None, None, *(known.mul_(gradient) for known in ctx.gradients)


def trunk(model: Any) -> Any:
    """Return the part of a causal LM below its head; for a peft model, of the LM inside."""
    return model.get_base_model().model if hasattr(model, "get_base_model") else model.model


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean relative squared error of hidden states [B, T, D].

    Each token is divided by the energy of the teacher's state; otherwise attention sinks would dominate.
    """
    difference = (student.float() - teacher.float()).square().sum(-1)
    return (difference / teacher.float().square().sum(-1).clamp_min(1e-12)).mean()
