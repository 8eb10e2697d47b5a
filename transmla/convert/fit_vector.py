"""The parameters of a fit: the factors of several layers as one scaled vector, which processes divide.

Each process computes the loss of a part of the tokens, and needs all factors for it. The rest of a step is divided by
parameters (the first stage of ZeRO, arXiv 1910.02054): each process computes the factors of its own share of the
vector, their gradient in coordinates, and Adam's update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Size, Tensor
from torch.nn.functional import pad

from transmla.artifacts import LayerFactors
from transmla.core.fit_coordinates import Coordinates
from transmla.ranks import Ranks


class Place(NamedTuple):
    """The place of one tensor.

    Attributes:
        span: the values of each share that belong to the tensor.
        shape: the tensor's shape.
        matrix: the matrix [F, F] that rows in coordinates are multiplied by to give the factor; None if they are equal.
    """

    span: slice
    shape: Size
    matrix: Tensor | None


class FitParameters:
    """The fitted parameters: all tensors of all layers as one vector, in equal shares for n processes.

    Each tensor is divided by its root mean square at the start, so one learning rate suits all tensors. A share of S
    values holds one n-th of every tensor, so that all shares cost the same time. Maps that read the layer's input are
    cut between rows. Zeros at the end of a tensor make its parts equally long.

    Attributes:
        vector: this process's parameters [S], float32; the optimizer changes them. Their gradient is ``vector.grad``.
        scale: root mean square [S] of each parameter's tensor; 0 where the parameter must stay 0.
        values: the factors [n, S] of all shares. ``renew`` computes this process's row; the caller exchanges the rows.
        gradients: the gradient [n, S] of ``values``, float32. ``vector.grad`` is this process's row.
    """

    def __init__(
        self,
        coordinates: Sequence[Coordinates],
        factors: Sequence[LayerFactors],
        masks: Sequence[Mapping[str, Tensor]],
        ranks: Ranks | None = None,
        *,
        half: bool = False,
    ) -> None:
        """Start at the first process's ``factors``.

        Args:
            coordinates: for each layer the coordinates that it is fitted in.
            factors: for each layer the starting point.
            masks: for each layer a mask by tensor name; ``masks[name]`` is 0 where that tensor must stay 0.
            ranks: the processes that divide the vector; None: one.
            half: whether the layers round factors to bfloat16 before every product. Processes then exchange bfloat16.
        """
        self.coordinates, self.ranks = coordinates, ranks or Ranks()
        self._places: list[dict[str, Place]] = []
        self._leaves: list[Tensor] = []
        smallest = torch.finfo(torch.float32).tiny
        parts, scales, start = [], [], 0
        for c, f, layer_masks in zip(coordinates, factors, masks, strict=True):
            self._places.append({})
            for name, value in c.to_coordinates(f).items():
                matrix = c.shrink if name in c.readers() else None
                mask = layer_masks.get(name, value.new_ones(())).to(value).expand_as(value).flatten().float()
                flat = value.flatten().float() * mask
                scale = (flat.square().sum() / mask.sum()).sqrt().clamp_min(smallest) * mask
                parts.append(self._divided(flat, matrix))
                scales.append(self._divided(scale, matrix))
                end = start + parts[-1].shape[1]
                self._places[-1][name] = Place(slice(start, end), value.shape, matrix)
                start = end
        scale = torch.cat(scales, 1)
        vector = torch.cat(parts, 1) / scale.clamp_min(smallest)
        self.ranks.copy_first(vector, scale)
        self.vector, self.scale = vector[self.ranks.rank].clone(), scale[self.ranks.rank].clone()
        self.values = torch.zeros_like(vector, dtype=torch.bfloat16 if half and self.ranks.size > 1 else torch.float32)
        self.gradients = torch.zeros_like(vector)
        self.vector.grad = self.gradients[self.ranks.rank]

    def renew(self) -> None:
        """Compute this process's row of ``values`` from its ``vector``."""
        for span, _, matrix in self._all_places():
            scaled = self.vector[span] * self.scale[span]
            self.values[self.ranks.rank, span].copy_(scaled if matrix is None else _rows_times(scaled, matrix))

    def factors(self) -> list[LayerFactors]:
        """Return each layer's factors, from ``values``; ``differentiate`` computes their gradients."""
        tensors = self._tensors(self.values)
        self._leaves = [tensor.requires_grad_() for layer in tensors for tensor in layer.values()]
        return [replace(c.origin, **layer) for c, layer in zip(self.coordinates, tensors, strict=True)]  # type: ignore[arg-type]

    def differentiate(self, loss: Tensor) -> None:
        """Compute ``gradients`` for a ``loss`` of the ``factors`` that were returned last."""
        gradients = torch.autograd.grad(loss, self._leaves)
        self._leaves = []
        for (span, _, matrix), gradient in zip(self._all_places(), gradients, strict=True):
            self.gradients[:, span].copy_(self._divided(gradient.flatten(), matrix))

    def pull_back(self) -> None:
        """Turn this process's row of ``gradients`` into the gradient of its ``vector``, in place."""
        for span, _, matrix in self._all_places():
            gradient = self.gradients[self.ranks.rank, span]
            torch.mul(gradient if matrix is None else _rows_times(gradient, matrix.mT), self.scale[span], out=gradient)

    def result(self) -> list[LayerFactors]:
        """Return each layer's factors for the current ``vector`` of all processes, float32."""
        tensors = self._tensors(self.ranks.gather(self.vector * self.scale))
        return [c.to_factors(layer) for c, layer in zip(self.coordinates, tensors, strict=True)]

    def _all_places(self) -> list[Place]:
        return [place for layer in self._places for place in layer.values()]

    def _divided(self, values: Tensor, matrix: Tensor | None) -> Tensor:
        """Return the equal parts [n, …] of a tensor's ``values`` [m]: whole rows, if it has a ``matrix`` [F, F]."""
        unit = self.ranks.size * (1 if matrix is None else len(matrix))
        missing = -len(values) % unit
        return (pad(values, (0, missing)) if missing else values).view(self.ranks.size, -1)

    def _tensors(self, shares: Tensor) -> list[dict[str, Tensor]]:
        """Return each layer's tensors by name, without gradient, from all ``shares`` [n, S]; views if n is 1."""
        return [
            {
                name: shares[:, span].flatten()[: shape.numel()].view(shape).detach()
                for name, (span, shape, _) in places.items()
            }
            for places in self._places
        ]


def _rows_times(values: Tensor, matrix: Tensor) -> Tensor:
    """Return the rows of F values in ``values`` [m·F] times ``matrix`` [F, F], as one vector again."""
    return (values.view(-1, len(matrix)) @ matrix).flatten()
