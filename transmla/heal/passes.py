"""The forward and backward passes of one step: with whole models in every process, or with sharded ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from transmla.cuda_graphs import Graphs
from transmla.ranks import Ranks


class Passes(Protocol):
    """Computes the gradients of one step.

    Attributes:
        model: the prepared ``Distiller``.
        optimiser: the prepared optimiser.
    """

    model: Any
    optimiser: Any

    def gradients(self, rows: Tensor, parts: int) -> Tensor:
        """Leave the mean gradients of all processes in the parameters; return this process's mean loss.

        Args:
            rows: sequences [n, T] of this process.
            parts: number of parts that they are computed in, one after another.
        """
        ...

    def clip(self, largest: float) -> Tensor:
        """Scale the gradients down to a norm of ``largest``, if theirs is larger, and return the norm they had."""
        ...

    def clear(self) -> None:
        """Forget the gradients."""
        ...


class Whole:
    """Every process holds the whole student.

    All gradients lie in one tensor, which the processes add up with one call after the backward pass.
    """

    def __init__(
        self,
        accelerator: Any,
        distiller: nn.Module,
        optimiser: torch.optim.Optimizer,
        *,
        graphs: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare ``distiller``, which gets the first process's weights, and its ``optimiser``.

        Args:
            accelerator: the accelerator of the run.
            distiller: student and teacher.
            optimiser: the optimiser of the student's trainable weights.
            graphs: replay the passes from a CUDA graph on a GPU, and call this with the reason if that is impossible;
                None always runs them eagerly.
        """
        # In evaluation mode, accelerate does not wrap the model in DistributedDataParallel.
        self.model = accelerator.prepare_model(distiller, evaluation_mode=True)
        self.optimiser = accelerator.prepare_optimizer(optimiser)
        self.ranks = Ranks(accelerator.process_index, accelerator.num_processes)
        parameters = [p for p in distiller.parameters() if p.requires_grad]
        self.ranks.copy_first(*(p.detach() for p in parameters))
        self._gradients = torch.zeros(sum(p.numel() for p in parameters), device=accelerator.device)
        for parameter, part in zip(parameters, self._parts(parameters), strict=True):
            parameter.grad = part
        self._graphs = graphs
        self._loss = torch.zeros((), device=accelerator.device)
        self._rows: Tensor | None = None
        self._pass: Callable[[], None]

    def gradients(self, rows: Tensor, parts: int) -> Tensor:
        """See ``Passes``."""
        self._loss.zero_()
        for micro in rows.chunk(parts):
            if self._rows is None or self._rows.shape != micro.shape:
                self._rows, self._pass = torch.empty_like(micro), self._make_pass(parts)
            self._rows.copy_(micro)
            self._pass()
        self.ranks.add_up(self._gradients)
        return self._loss.clone()

    def _make_pass(self, parts: int) -> Callable[[], None]:
        """Return a function that adds a part's share of the gradients and of the loss, for the part in ``_rows``."""

        def one_pass() -> None:
            loss, _ = self.model(self._rows)
            (loss / (parts * self.ranks.size)).backward()
            self._loss.add_(loss.detach() / parts)

        if self._graphs is None:
            return one_pass
        return Graphs(self._loss.device).captured(one_pass, self._graphs)

    def clip(self, largest: float) -> Tensor:
        """See ``Passes``."""
        norm = torch.linalg.vector_norm(self._gradients)
        self._gradients.mul_((largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def clear(self) -> None:
        """See ``Passes``."""
        self._gradients.zero_()

    def _parts(self, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
        start = 0
        for parameter in parameters:
            yield self._gradients[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()


class Sharded:
    """FSDP2 or DeepSpeed hold the student, and add up the gradients during the backward pass."""

    def __init__(self, accelerator: Any, distiller: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Prepare ``distiller`` and its ``optimiser``."""
        self.accelerator = accelerator
        self.model, self.optimiser = accelerator.prepare(distiller, optimiser)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]

    def gradients(self, rows: Tensor, parts: int) -> Tensor:
        """See ``Passes``."""
        total = torch.zeros((), device=rows.device)
        for micro in rows.chunk(parts):
            with self.accelerator.accumulate(self.model):
                loss, _ = self.model(micro)
                self.accelerator.backward(loss)
            total += loss.detach() / parts
        return total

    def clip(self, largest: float) -> Tensor:
        """See ``Passes``."""
        norm: Tensor = self.accelerator.clip_grad_norm_(self._parameters, largest)
        return norm

    def clear(self) -> None:
        """See ``Passes``."""
        self.optimiser.zero_grad()
