"""The parameters of a fit: the factors of several layers as one scaled vector, which processes divide.

Each process computes the loss and its gradient for a part of the tokens, and therefore needs all factors. It owns only
a share of the vector: it computes the factors of its share, their gradient in coordinates, and Adam's update (the
first stage of ZeRO, arXiv 1910.02054). In every step, the processes add up the gradients and exchange the factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Size, Tensor
from torch.nn.functional import pad

from transmla.artifacts import LayerFactors
from transmla.core.fit_coordinates import Coordinates
from transmla.core.fused_attention import ALIGNMENT
from transmla.ranks import Ranks


class Place(NamedTuple):
    """The place of one tensor in the whole vector, and its shape."""

    span: slice
    shape: Size


class Piece(NamedTuple):
    """The part of one tensor that lies in a process's share.

    Attributes:
        span: the part's place in the share.
        matrix: the matrix [F, F] that rows in coordinates are multiplied by; None if the tensor has no coordinates.
    """

    span: slice
    matrix: Tensor | None


class FitParameters:
    """The fitted parameters: all tensors of all layers as one vector, in n equal shares for n processes.

    Each tensor is divided by its root mean square at the start, so one learning rate suits all tensors. With several
    processes, zeros follow the tensors, so that every share has S values and begins with a whole row of F values.

    Attributes:
        vector: this process's parameters [S], float32; the optimizer changes them. Their gradient is ``vector.grad``.
        scale: root mean square [S] of each parameter's tensor; 0 where the parameter must stay 0.
        values: the factors' tensors in all shares [n, S]. ``renew`` computes this process's row.
        gradients: the gradients of ``values`` [n, S], float32. ``vector.grad`` is this process's row.
        factors: each layer's factors, whose fitted tensors are views of ``values``.
        leaves: these tensors; gradients are computed for them.
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
        count, several = self.ranks.size, self.ranks.size > 1
        # Tensors and shares begin at multiples of the unit: at whole rows, and at addresses for which GPUs are fast.
        unit = math.lcm(ALIGNMENT, *(len(c.shrink) for c in coordinates)) if several else 1
        smallest = torch.finfo(torch.float32).tiny
        flat, scales, start = [], [], 0
        self._places: list[dict[str, Place]] = []
        for c, f, layer_masks in zip(coordinates, factors, masks, strict=True):
            places = {}
            for name, value in c.to_coordinates(f).items():
                places[name] = Place(slice(start, start + value.numel()), value.shape)
                mask = layer_masks.get(name, value.new_ones(())).to(value).expand_as(value).flatten().float()
                masked = value.flatten().float() * mask
                flat.append(_padded(masked, unit))
                scales.append(_padded((masked.square().sum() / mask.sum()).sqrt().clamp_min(smallest) * mask, unit))
                start += len(flat[-1])
            self._places.append(places)
        scale = _padded(torch.cat(scales), unit * count)
        vector = _padded(torch.cat(flat), unit * count) / scale.clamp_min(smallest)
        self.ranks.copy_first(vector, scale)
        self.gradients = torch.zeros_like(vector).view(count, -1)
        self.values = self.gradients.to(torch.bfloat16 if half and several else torch.float32, copy=True)
        self.vector, self.scale = (whole.view(count, -1)[self.ranks.rank].clone() for whole in (vector, scale))
        self.vector.grad = self.gradients[self.ranks.rank]
        self._pieces = self._own_pieces()
        fitted = self._tensors(self.values)
        self.leaves = [tensor.requires_grad_() for layer in fitted for tensor in layer.values()]
        self.factors = [replace(c.origin, **layer) for c, layer in zip(coordinates, fitted, strict=True)]  # type: ignore[arg-type]
        self._leaf_gradients = [tensor for layer in self._tensors(self.gradients) for tensor in layer.values()]

    def renew(self) -> None:
        """Compute this process's row of ``values`` from its ``vector``."""
        values = self.values[self.ranks.rank]
        for span, matrix in self._pieces:
            scaled = self.vector[span] * self.scale[span]
            values[span].copy_(scaled if matrix is None else _rows_times(scaled, matrix))

    def collect(self, gradients: Sequence[Tensor]) -> None:
        """Copy the gradients of the ``leaves`` into ``gradients``."""
        for own, gradient in zip(self._leaf_gradients, gradients, strict=True):
            own.copy_(gradient)

    def pull_back(self) -> None:
        """Replace this process's row of ``gradients`` by the gradient of its ``vector``, in place."""
        gradients = self.gradients[self.ranks.rank]
        for span, matrix in self._pieces:
            gradient = gradients[span] if matrix is None else _rows_times(gradients[span], matrix.mT)
            torch.mul(gradient, self.scale[span], out=gradients[span])

    def result(self) -> list[LayerFactors]:
        """Return each layer's factors for the current ``vector`` of all processes, float32."""
        tensors = self._tensors(self.ranks.gather(self.vector * self.scale))
        return [c.to_factors(layer) for c, layer in zip(self.coordinates, tensors, strict=True)]

    def _tensors(self, shares: Tensor) -> list[dict[str, Tensor]]:
        """Return each layer's tensors, by name, as views of ``shares`` [n, S]."""
        flat = shares.view(-1)
        return [
            {name: flat[span].view(shape).detach() for name, (span, shape) in places.items()} for places in self._places
        ]

    def _own_pieces(self) -> list[Piece]:
        """Return the pieces in this process's share."""
        size, pieces = len(self.vector), []
        before = self.ranks.rank * size
        for c, places in zip(self.coordinates, self._places, strict=True):
            for name, (span, _) in places.items():
                start, stop = max(span.start - before, 0), min(span.stop - before, size)
                if start < stop:
                    pieces.append(Piece(slice(start, stop), c.shrink if name in c.readers() else None))
        return pieces


def _padded(values: Tensor, unit: int) -> Tensor:
    """Append zeros to ``values`` [m] up to a multiple of ``unit``."""
    return pad(values, (0, -len(values) % unit))


def _rows_times(values: Tensor, matrix: Tensor) -> Tensor:
    """Return the rows in ``values`` [m·F] times ``matrix`` [F, F], as one vector again."""
    return (values.view(-1, len(matrix)) @ matrix).flatten()
