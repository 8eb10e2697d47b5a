"""The parameters of a fit: the factors of several layers as one scaled vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors
from transmla.core.fit_coordinates import Coordinates


class FitParameters:
    """The fitted parameters: all tensors of all layers as one vector.

    Each tensor is divided by its root mean square at the start, so one learning rate suits all tensors.

    Attributes:
        vector: the parameters [P], float32; the leaf tensor that the optimizer changes.
        scale: root mean square [P] of each parameter's tensor; 0 where the parameter must stay 0.
    """

    def __init__(
        self,
        coordinates: Sequence[Coordinates],
        factors: Sequence[LayerFactors],
        masks: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Start at ``factors``.

        Args:
            coordinates: for each layer the coordinates that it is fitted in.
            factors: for each layer the starting point.
            masks: for each layer a mask by tensor name; ``masks[name]`` is 0 where that tensor must stay 0.
        """
        self.coordinates = coordinates
        tensors = [c.to_coordinates(f) for c, f in zip(coordinates, factors, strict=True)]
        self.shapes = [{name: value.shape for name, value in layer.items()} for layer in tensors]
        smallest = torch.finfo(torch.float32).tiny
        flat, scales = [], []
        for layer, layer_masks in zip(tensors, masks, strict=True):
            for name, value in layer.items():
                mask = layer_masks.get(name, value.new_ones(())).to(value).expand_as(value).flatten().float()
                flat.append(value.flatten().float() * mask)
                scales.append((flat[-1].square().sum() / mask.sum()).sqrt().clamp_min(smallest) * mask)
        self.scale = torch.cat(scales)
        self.vector = (torch.cat(flat) / self.scale.clamp_min(smallest)).requires_grad_()

    def factors(self) -> list[LayerFactors]:
        """Return each layer's factors for the current ``vector``; differentiable."""
        pieces = iter((self.vector * self.scale).split([shape.numel() for s in self.shapes for shape in s.values()]))
        return [
            c.to_factors({name: next(pieces).view(shape) for name, shape in shapes.items()})
            for c, shapes in zip(self.coordinates, self.shapes, strict=True)
        ]
