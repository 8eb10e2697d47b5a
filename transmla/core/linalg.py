"""Weighted low-rank approximation and its helpers, in the dtype of the input (float64 in practice)."""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.artifacts import LayerWeights

# Alternating steps of ``latent_of_two``.
ALTERNATIONS = 15


def regularise(moment: Tensor, relative: float = 1e-6) -> Tensor:
    """Return ``moment`` [..., n, n] plus ``relative`` times its mean diagonal on the diagonal.

    Directions without any input get a small positive energy, so the matrix can be inverted.
    """
    mean_diagonal = moment.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(torch.finfo(moment.dtype).tiny)
    return moment + torch.diag_embed((relative * mean_diagonal).expand(moment.shape[:-1]))


def sqrtm_pair(moment: Tensor, floor: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a positive semi-definite matrix and its inverse, both [..., n, n].

    Eigenvalues below ``floor`` times the largest are raised to this value, so the inverse is finite.
    """
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(values[..., -1:] * floor).clamp_min(torch.finfo(moment.dtype).tiny)
    root = (vectors * values.sqrt()[..., None, :]) @ vectors.mT
    inverse = (vectors * values.rsqrt()[..., None, :]) @ vectors.mT
    return root, inverse


def latent_basis(target: Tensor, moment: Tensor, rank: int) -> Tensor:
    """Return the projection W_c [rank, D] whose latent c = W_c x approximates ``target`` best.

    Solves min over B and W_c of ‖(T − B·W_c) C^{1/2}‖_F by the singular value decomposition of T·C^{1/2}
    (Eckart–Young in the metric of the data). The latent is white: W_c C W_cᵀ = I.

    Args:
        target: T [n, D], the maps to approximate.
        moment: C = E[x xᵀ] [D, D].
        rank: width of the latent.
    """
    root, inverse = sqrtm_pair(moment)
    # The D×D Gram matrix has the size of C even if the target has many more rows.
    gram = root @ (target.mT @ target) @ root
    del root  # the next decomposition takes several times its memory
    _, vectors = torch.linalg.eigh(gram)
    basis: Tensor = vectors.flip(-1)[:, :rank].mT @ inverse
    return basis


def latent_of_two(first: Tensor, second: Tensor, moments: tuple[Tensor, Tensor], rank: int) -> Tensor:
    """Return the projection W_c [rank, D] of a latent for two targets, each in the metric of its own data.

    Minimises ‖(T₁ − B₁·W_c) C₁^{1/2}‖² + ‖(T₂ − B₂·W_c) C₂^{1/2}‖² over W_c, B₁ and B₂ by ALTERNATIONS alternating
    steps. The minimum over W_c solves B₁ᵀB₁·W_c·C₁ + B₂ᵀB₂·W_c·C₂ = B₁ᵀT₁C₁ + B₂ᵀT₂C₂. This equation is diagonal in
    the bases that diagonalise both C₁ and C₂, and both B₁ᵀB₁ and B₂ᵀB₂.

    Args:
        first: T₁ [n₁, D].
        second: T₂ [n₂, D].
        moments: C₁ and C₂ [D, D], positive definite.
        rank: width of the latent.
    """
    # Start from the best latent in the mean metric, with each target's total energy unchanged.
    scale = torch.stack([moment.diagonal().mean() for moment in moments])
    mean = (moments[0] / scale[0] + moments[1] / scale[1]) / 2
    latent = latent_basis(torch.cat([first * scale[0].sqrt(), second * scale[1].sqrt()]), mean, rank)
    inputs, ratio = diagonalise(*moments)
    for _ in range(ALTERNATIONS):
        readouts = regress(first, latent, moments[0]), regress(second, latent, moments[1])
        right = readouts[0].mT @ first @ moments[0] + readouts[1].mT @ second @ moments[1]
        outputs, gain = diagonalise(*(regularise(readout.mT @ readout, 1e-9) for readout in readouts))
        latent = outputs @ (outputs.mT @ right @ inputs / (gain[:, None] * ratio + 1)) @ inputs.mT
    return latent


def diagonalise(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return X [n, n] and λ [n] with XᵀaX = diag(λ) and XᵀbX = I, for symmetric ``a`` and positive definite ``b``."""
    _, inverse = sqrtm_pair(b)
    values, vectors = torch.linalg.eigh(inverse @ a @ inverse)
    return inverse @ vectors, values


def regress(target: Tensor, basis: Tensor, moment: Tensor) -> Tensor:
    """Return the least-squares read-out B [..., n, r] of ``target`` [..., n, D] from a latent.

    B minimises E‖(``target`` − B·``basis``) x‖², with ``basis`` [r, D] and E[x xᵀ] = ``moment`` [D, D].
    """
    cross = target @ moment @ basis.mT
    gram = basis @ moment @ basis.mT
    readout: Tensor = torch.linalg.solve(gram, cross, left=False)
    return readout


def orthonormal_rows(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Factor ``basis`` [r, D] into T·R with orthonormal rows R; return R [r, D] and T [r, r]."""
    columns, triangle = torch.linalg.qr(basis.mT)
    return columns.mT, triangle.mT


def channel_norm(weight: Tensor, moment: Tensor) -> Tensor:
    """Return the root mean square [..., n] of each output of ``weight`` [..., n, D] for E[x xᵀ] = ``moment`` [D, D]."""
    return ((weight @ moment) * weight).sum(-1).clamp_min(0).sqrt()


def match_channel_norms(rest: Tensor, weights: LayerWeights, moment: Tensor) -> Tensor:
    """Return the scalar that scales ``rest`` to the values' mean channel norm.

    If the rotary key holds the keys completely, ``rest`` is only rounding error. Its norm therefore counts as at least
    a thousandth of the keys' norm, so that rounding errors take no channels of the latent.

    Args:
        rest: the part of the keys [..., n, D] that the rotary channels do not hold.
        weights: the layer's weights.
        moment: E[x xᵀ] [D, D].
    """
    keys, values = channel_norm(weights.k, moment).mean(), channel_norm(weights.v, moment).mean()
    rest_norm = torch.maximum(channel_norm(rest, moment).mean(), keys * 1e-3).clamp_min(1e-30)
    return torch.maximum(values, rest_norm * 1e-3) / rest_norm
