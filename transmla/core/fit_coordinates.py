"""The coordinates in which gradient steps fit a layer's factors.

The inputs of a language model differ in size by orders of magnitude between directions, and every basis of the latent
gives the same layer. Both choices change the gradient steps but not the attention's output. The fit therefore treats
maps of the input x as maps of C^{−α} x, and uses the basis in which the latent is white.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transmla.artifacts import LayerFactors
from transmla.core.linalg import regularise, sqrtm_pair

# Exponent α of C. At 1/2 the input would be white. Chosen on WikiText-2 validation text: 1/4 and 1/2 are 4 % better
# than 0 with rows of 16 + 32 values, and no different at half the cache.
WHITENING = 0.25


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of one layer.

    Attributes:
        origin: factors (float32) of the layer; they supply everything that is not fitted.
        moment: C = E[x xᵀ] [D, D] of the attention's input, regularised.
        shrink: C^{−α} [D, D].
        grow: C^{α} [D, D].
    """

    origin: LayerFactors
    moment: Tensor
    shrink: Tensor
    grow: Tensor

    @classmethod
    def of(
        cls, factors: LayerFactors, moment: Tensor, blocks: Tensor | None = None, *, empty: bool = False
    ) -> Coordinates:
        """Return coordinates for ``factors``.

        Args:
            factors: the layer before the fit.
            moment: E[x xᵀ] [D, D] of the attention's input.
            blocks: number [D] of the block that each input feature belongs to. A map that reads only one block then
                reads only this block in the coordinates too.
            empty: leave ``shrink`` and ``grow`` empty, for matrices that another process computes.
        """
        moment = regularise(moment.double())
        if blocks is not None:
            moment = moment * (blocks[:, None] == blocks)
        if empty:
            shrink, grow = (torch.empty_like(moment, dtype=torch.float32) for _ in range(2))
            return cls(factors.to(torch.float32), moment, shrink, grow)
        values, vectors = torch.linalg.eigh(moment)
        values = values.clamp_min(values[-1] * 1e-9)
        shrink, grow = ((vectors * values**power) @ vectors.mT for power in (-WHITENING, WHITENING))
        return cls(factors.to(torch.float32), moment, shrink.float(), grow.float())

    def to_coordinates(self, factors: LayerFactors) -> dict[str, Tensor]:
        """Return the tensors of ``factors`` that are fitted, by name and with their shapes, in these coordinates."""
        f = factors.to(torch.float64)
        root, inverse = self._roots(f.latent)
        tensors = {
            "q_nope": f.q_nope,
            "q_pe": f.q_pe,
            "latent": inverse @ f.latent,
            "rope": f.rope,
            "k_up": f.k_up @ root,
            "v_up": f.v_up @ root,
            "o": f.o,
        }
        if f.q_latent is not None:
            root, inverse = self._roots(f.q_latent)
            tensors["q_latent"] = inverse @ f.q_latent
            tensors["q_nope"], tensors["q_pe"] = f.q_nope @ root, f.q_pe @ root
        for name in self.readers():
            tensors[name] = tensors[name] @ self.grow.double()
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def to_factors(self, tensors: dict[str, Tensor]) -> LayerFactors:
        """Return the layer whose tensors in these coordinates are ``tensors``; differentiable."""
        plain = {name: tensors[name] @ self.shrink for name in self.readers()}
        return replace(self.origin, **(tensors | plain))  # type: ignore[arg-type]

    def readers(self) -> tuple[str, ...]:
        """Return the names of the maps that read the layer's input directly."""
        queries = ("q_nope", "q_pe") if self.origin.q_latent is None else ("q_latent",)
        return (*queries, "latent", "rope")

    def _roots(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the square root [r, r] of the covariance of the latent ``rows`` [r, D], and its inverse [r, r]."""
        return sqrtm_pair(rows @ self.moment @ rows.mT, floor=1e-9)
