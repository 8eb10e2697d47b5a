"""The parameters of a fit: the factors of several layers as one scaled vector, divided among processes.

The processes compute the gradient together, each for its part of the tokens. All else is divided (arXiv 1910.02054):
each process owns one share of the vector, and computes the coordinates, Adam's update and the factors of this share
alone. A step therefore exchanges the gradients of the factors, and then the new factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from transmla.artifacts import LayerFactors
from transmla.core.fit_coordinates import Coordinates
from transmla.core.fused_attention import ALIGNMENT
from transmla.ranks import Ranks


class Piece(NamedTuple):
    """The part of one tensor that lies in a share.

    Attributes:
        span: the part's place in the share; whole rows if there is a matrix.
        matrix: matrix [F, F] that takes a row in coordinates to the factor's row; None if they are equal.
    """

    span: slice
    matrix: Tensor | None


class FitParameters:
    """The fitted parameters: all tensors of all layers as one vector.

    Each tensor is divided by its root mean square at the start, so one learning rate suits all tensors. The vector is
    divided into a share of S values for each of the n processes. With several processes, zeros after the tensors make
    all shares equally long, and no row of a map that reads the layer's input lies in two shares.

    Attributes:
        vector: this process's parameters [S], float32; the optimizer changes them. Their gradient is ``vector.grad``.
        scale: root mean square [S] of each parameter's tensor; 0 where the parameter must stay 0.
        factors: each layer's factors, whose fitted tensors are leaf tensors with the memory of ``values``.
        leaves: these leaf tensors.
        values: the factors of all processes' shares [n, S]; ``renew`` computes the row of this process.
        gradients: their gradients [n, S], float32; ``pull_back`` reads the row of this process.
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
            half: whether the layers round factors to bfloat16 before every product. Processes then exchange them so.
        """
        self.coordinates, self.ranks = coordinates, ranks or Ranks()
        tensors = [c.to_coordinates(f) for c, f in zip(coordinates, factors, strict=True)]
        self.shapes = [{name: value.shape for name, value in layer.items()} for layer in tensors]
        # Tensors and shares begin at multiples of the unit: at whole rows, which GPUs can multiply where they are.
        self._unit = math.lcm(ALIGNMENT, *(len(c.shrink) for c in coordinates)) if self.ranks.size > 1 else 1
        smallest = torch.finfo(torch.float32).tiny
        flat, scales = [], []
        for layer, layer_masks in zip(tensors, masks, strict=True):
            for name, value in layer.items():
                mask = layer_masks.get(name, value.new_ones(())).to(value).expand_as(value).flatten().float()
                values = value.flatten().float() * mask
                scale = (values.square().sum() / mask.sum()).sqrt().clamp_min(smallest) * mask
                flat.append(_padded(values, self._unit))
                scales.append(_padded(scale, self._unit))
        scale = _padded(torch.cat(scales), self._unit * self.ranks.size)
        vector = _padded(torch.cat(flat), len(scale)) / scale.clamp_min(smallest)
        self.ranks.copy_first(vector, scale)
        self.vector, self.scale = (t.view(self.ranks.size, -1)[self.ranks.rank].clone() for t in (vector, scale))
        self._pieces = self._own_pieces()
        dtype = torch.bfloat16 if half and self.ranks.size > 1 else torch.float32
        self.values = torch.zeros_like(vector, dtype=dtype).view(self.ranks.size, -1)
        self.gradients = torch.zeros_like(vector).view(self.ranks.size, -1)
        self.vector.grad = self.gradients[self.ranks.rank]
        fitted = [{name: t.requires_grad_() for name, t in layer.items()} for layer in self._tensors(self.values)]
        self.leaves = [tensor for layer in fitted for tensor in layer.values()]
        self._slots = [tensor for layer in self._tensors(self.gradients) for tensor in layer.values()]
        self.factors = [replace(c.origin, **layer) for c, layer in zip(coordinates, fitted, strict=True)]  # type: ignore[arg-type]

    def renew(self) -> None:
        """Compute this process's row of ``values`` from its ``vector``."""
        values = self.values[self.ranks.rank]
        for span, matrix in self._pieces:
            scaled = self.vector[span] * self.scale[span]
            values[span].copy_(scaled if matrix is None else _times(scaled, matrix))

    def collect(self, gradients: Sequence[Tensor]) -> None:
        """Copy the gradients of the ``leaves`` into ``gradients``."""
        for slot, gradient in zip(self._slots, gradients, strict=True):
            slot.copy_(gradient)

    def pull_back(self) -> None:
        """Replace this process's row of ``gradients`` by the gradient of its ``vector``."""
        gradients = self.gradients[self.ranks.rank]
        for span, matrix in self._pieces:
            gradient = gradients[span]
            gradient = gradient if matrix is None else _times(gradient, matrix.mT)
            torch.mul(gradient, self.scale[span], out=gradients[span])

    @torch.no_grad()
    def result(self) -> list[LayerFactors]:
        """Return each layer's factors in float32 for the current ``vector`` of all processes."""
        tensors = self._tensors(self.ranks.gather(self.vector * self.scale))
        return [c.to_factors(layer) for c, layer in zip(self.coordinates, tensors, strict=True)]

    def _places(self) -> list[dict[str, slice]]:
        """Return the place of each layer's tensors in the whole vector, by name."""
        places, start = [], 0
        for shapes in self.shapes:
            places.append({})
            for name, shape in shapes.items():
                places[-1][name] = slice(start, start + shape.numel())
                start += -(-shape.numel() // self._unit) * self._unit
        return places

    def _tensors(self, rows: Tensor) -> list[dict[str, Tensor]]:
        """Return each layer's tensors, by name, in the memory of ``rows`` [n, S]."""
        flat = rows.detach().view(-1)
        return [
            {name: flat[place].view(shapes[name]) for name, place in places.items()}
            for shapes, places in zip(self.shapes, self._places(), strict=True)
        ]

    def _own_pieces(self) -> list[Piece]:
        """Return the parts of all tensors that lie in this process's share."""
        size, pieces = len(self.vector), []
        offset = self.ranks.rank * size
        for coordinates, places in zip(self.coordinates, self._places(), strict=True):
            readers = coordinates.readers()
            for name, place in places.items():
                first, last = max(place.start - offset, 0), min(place.stop - offset, size)
                if first < last:
                    pieces.append(Piece(slice(first, last), coordinates.shrink if name in readers else None))
        return pieces


def _padded(values: Tensor, unit: int) -> Tensor:
    """Append zeros to ``values`` [n] up to a multiple of ``unit``."""
    return pad(values, (0, -len(values) % unit))


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply each F of the values ``rows`` [m·F], as one row, by ``matrix`` [F, F]."""
    return (rows.view(-1, len(matrix)) @ matrix).flatten()
