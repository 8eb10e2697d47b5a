"""Measure how sensitive an attention's output is to errors on its keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.artifacts import LayerWeights, Sensitivity
from transmla.ranks import Ranks


class SensitivityMeter:
    """Sums the moments of one layer over calibration text, a part of the heads and sequences at a time.

    Attributes:
        mass: Σ a_ij² ‖W_o(v_j − o_ih)‖² by distance [H, T]; the caller adds to it.
    """

    def __init__(self, weights: LayerWeights, width: int, length: int) -> None:
        """Start at zero.

        Args:
            weights: the layer's weights as maps of its features.
            width: number of features, F.
            length: number of tokens in a sequence, T.
        """
        self.weights = weights
        heads, d, _ = weights.q.shape
        self.group = heads // len(weights.k)
        self.output = weights.o.mT @ weights.o
        self.key_moment = weights.q.new_zeros(width, width, dtype=torch.float64)
        self.value_moment = torch.zeros_like(self.key_moment)
        self.query_moment = weights.q.new_zeros(heads, d, d, dtype=torch.float64)
        self.head_energy = weights.q.new_zeros(heads, dtype=torch.float64)
        self.mass = weights.q.new_zeros(heads, length, dtype=torch.float64)
        self.positions = weights.q.new_zeros((), dtype=torch.float64)

    def add(self, heads: slice, x: Tensor, queries: Tensor, attention: Tensor, energy: Tensor) -> Tensor:
        """Add the query heads of one key head.

        Args:
            heads: the query heads.
            x: features [n, T, F].
            queries: positions [Q] of the queries.
            attention: attention weights [n, H/G, Q, T].
            energy: energy [n, Q] of the whole attention's output at the queries.

        Returns:
            The weights a_ij² ‖W_o(v_j − o_ih)‖² of the keys, summed over sequences, [H/G, Q, T].
        """
        metric = self.output[heads]
        values = (x @ self.weights.v[heads.start // self.group].mT)[:, None]
        mixed = attention @ values
        projected = values @ metric
        # ‖W_o(v_j − o)‖² by the binomial formula.
        distance = (projected * values).sum(-1)[:, :, None] - 2 * mixed @ projected.mT
        distance = distance + (mixed @ metric * mixed).sum(-1, keepdim=True)
        squared = attention.square() / energy.clamp_min(torch.finfo(energy.dtype).tiny)[:, None, :, None]
        influence = squared * distance.clamp_min(0)
        self.value_moment += _weighted(x, squared.sum((1, 2)))
        self.key_moment += _weighted(x, influence.sum((1, 2)))
        weight = influence.sum(-1)
        q = torch.einsum("ntF,hdF->nhtd", x[:, queries], self.weights.q[heads])
        self.query_moment[heads] += ((q * weight[..., None]).mT @ q).sum(0, dtype=torch.float64)
        self.head_energy[heads] += weight.sum((0, 2), dtype=torch.float64)
        if heads.start == 0:
            self.positions += len(x) * len(queries)
        return influence.sum(0)

    def result(self, ranks: Ranks) -> Sensitivity:
        """Return the means over all queries of all processes."""
        ranks.add_up(self.key_moment, self.value_moment, self.query_moment, self.head_energy, self.mass, self.positions)
        tiny = torch.finfo(torch.float64).tiny
        return Sensitivity(
            self.key_moment / self.positions,
            self.value_moment / self.positions,
            self.query_moment / self.head_energy.clamp_min(tiny)[:, None, None],
            self.head_energy / self.head_energy.sum().clamp_min(tiny),
            self.mass / self.mass.sum(-1, keepdim=True).clamp_min(tiny),
        )


def _weighted(x: Tensor, weight: Tensor) -> Tensor:
    """Return Σ weight·x xᵀ [F, F] in float64, for features ``x`` [n, T, F] and weights [n, T]."""
    return (x.flatten(0, 1).mT @ (x * weight[..., None]).flatten(0, 1)).double()
